"use strict";
// The rollback: asks for version, reason and a confirmation, triggers Airflow's DAG as the user, follows the run.

const dialog = { name: "", watching: 0, run: "" };

function openDialog(card) {
  const { found } = card;
  Object.assign(dialog, { name: card.name, champion: found.champion, rollout: found.rollout?.active && found.rollout.version, watching: 0, run: "" });
  $("dialog-title").textContent = `Roll back ${card.name}`;
  $("dialog-user").textContent = page.user;
  const previous = found.previous && [make("option", { value: "" }, `the previous version (${found.previous})`)];
  const others = found.served.map((each) => make("option", { value: each }, `version ${each}`));
  $("dialog-version").replaceChildren(...(previous || []), ...others);
  for (const id of ["dialog-reason", "dialog-version", "dialog-sure"]) $(id).disabled = false;
  $("dialog-reason").value = "";
  $("dialog-close").textContent = "Cancel";
  for (const id of ["dialog-outcome", "dialog-run"]) $(id).hidden = true;
  $("dialog-go").hidden = false;
  asked();
  $("dialog").showModal();
  $("dialog-reason").focus();
}

// Whatever changes what would be done asks for a new confirmation.
function asked() {
  const target = $("dialog-version").selectedOptions[0]?.textContent || "";
  $("dialog-sure").checked = false;
  $("dialog-sure-text").textContent = `Yes: take all traffic of ${dialog.name} from version ${dialog.champion} to ${target}`
    + (dialog.rollout ? `, and end the rollout of version ${dialog.rollout}` : "");
  ready();
}

function ready() {
  $("dialog-go").disabled = !$("dialog-sure").checked || $("dialog-reason").value.trim().length < 3;
}

function outcome(text, kind = "") {
  Object.assign($("dialog-outcome"), { textContent: text, className: kind, hidden: false });
}

async function rollBack() {
  const conf = { workload: dialog.name, to: $("dialog-version").value || null, reason: $("dialog-reason").value.trim() };
  for (const id of ["dialog-reason", "dialog-version", "dialog-sure", "dialog-go"]) $(id).disabled = true;
  outcome("asking Airflow…");
  try {
    const run = await ask("../api/v2/dags/rollback/dagRuns", {
      method: "POST", headers: { "content-type": "application/json" }, body: JSON.stringify({ logical_date: null, conf }),
    });
    dialog.run = run.dag_run_id;
    Object.assign($("dialog-run"), { hidden: false });
    $("dialog-go").hidden = true;
    $("dialog-close").textContent = "Close";
    await watch(run.dag_run_id, Date.now());
  } catch (error) {
    outcome(error.message, "bad");
    for (const id of ["dialog-reason", "dialog-version", "dialog-sure"]) $(id).disabled = false;
    ready();
  }
}

const runPath = (run) => `dags/rollback/dagRuns/${encodeURIComponent(run)}`;

async function watch(run, began) {
  const turn = (dialog.watching += 1);
  while (dialog.watching === turn && dialog.run === run) {
    const { state } = await ask(`../api/v2/${runPath(run)}`);
    if (state === "success") { outcome("done: traffic, alias and ledger are back", "good"); return refresh(); }
    if (state === "failed") return outcome(`failed: ${await whyFailed(run)}`, "bad");
    const seconds = Math.round((Date.now() - began) / 1000);
    outcome(state === "queued" && seconds > 20 ? `queued for ${seconds} s: does Airflow's scheduler run, is the DAG paused?` : `${state}, ${seconds} s`);
    await new Promise((done) => setTimeout(done, 500));
  }
}

// The last error in the log of the last attempt, as far as the user may read it.
async function whyFailed(run) {
  try {
    const { task_instances: tasks } = await ask(`../api/v2/${runPath(run)}/taskInstances`);
    const task = tasks.find((each) => each.state === "failed") || tasks[0];
    const log = await ask(`../api/v2/${runPath(run)}/taskInstances/${task.task_id}/logs/${task.try_number}?full_content=true`);
    const causes = log.content.flatMap((line) => line.error_detail || []).filter((cause) => cause.exc_value);
    return causes.length ? causes[causes.length - 1].exc_value : "the run's log tells why";
  } catch {
    return "the run's log tells why";
  }
}

// Airflow's frame lets no link out of it; an element of Airflow's own page may go where it likes.
function showRun() {
  const path = new URL(`../dags/rollback/runs/${encodeURIComponent(dialog.run)}`, location.href).href;
  const link = parent.document.createElement("a");
  link.href = path;
  link.click();
}

$("dialog-version").onchange = asked;
$("dialog-reason").oninput = ready;
$("dialog-sure").onchange = ready;
$("dialog-close").onclick = () => $("dialog").close();
$("dialog-run").onclick = showRun;
$("dialog").onclose = () => { dialog.watching += 1; refresh(); };
$("dialog-go").onclick = (event) => { event.preventDefault(); rollBack(); };
