"""What each verb of the command does; ``tasks.cli`` declares verbs, options and exit codes."""
