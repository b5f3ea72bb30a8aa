"""Drydock: models are built, inspected, refitted, launched and recalled here."""

import os

# Libraries of ours that would tell their makers about each use, from any process of ours. Asked once, here, before
# any of them is imported; who wants to tell sets the variable.
UNTOLD = {
    "ORT_DISABLE_TELEMETRY": "1",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "GX_ANALYTICS_ENABLED": "false",
    "DVC_NO_ANALYTICS": "true",
}
for _name, _value in UNTOLD.items():
    os.environ.setdefault(_name, _value)
