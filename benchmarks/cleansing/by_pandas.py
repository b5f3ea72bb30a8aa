"""The same rules, log, quarantine, splits and demands in pandas and Great Expectations, as in a notebook."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

from cleansing.generate import LABELS, NUMBERS

BOUNDED = NUMBERS[:6]


def clean_by_pandas(raw: Path, room: Path) -> tuple[Any, dict[str, Any]]:
    """Write data, repairs and quarantine into ``room``; return the cleaned frame and what was found."""
    import numpy as np
    import pandas as pd

    before = pd.read_parquet(raw)
    frame, log = before.copy(), []

    def change(name: str, new: Any, rule: str, alive: Any = None) -> None:
        old = frame[name]
        differs = ~((old == new) | (old.isna() & new.isna()))
        differs = differs if alive is None else differs & alive
        rows = np.flatnonzero(differs.to_numpy())
        cells = {"row": rows, "column": name, "before": old.iloc[rows].astype(str), "after": new.iloc[rows].astype(str)}
        log.append(pd.DataFrame(cells | {"rule": rule}))
        frame[name] = new

    change("label", frame["label"].str.strip(), "trim")
    change("label", frame["label"].str.lower(), "case")
    allowed = frame["label"].isin(LABELS)
    for name in BOUNDED:
        change(name, frame[name].where(frame[name].between(0, 1000)), "range", allowed)
    change("n1", frame["n1"].fillna(100), "fill", allowed)
    condition = ~(frame["n0"] + frame["n3"] < 0)
    alive = allowed & condition
    counts = frame[alive].groupby(["zip", "city"]).size().reset_index(name="n")
    counts["total"] = counts.groupby("zip")["n"].transform("sum")
    winners = counts[counts["n"] * 2 > counts["total"]].set_index("zip")["city"]
    meant = frame["zip"].map(winners)
    change("city", meant.where(meant.notna() & alive, frame["city"]), "dependency")
    twins = pd.Series(False, index=frame.index)
    twins[alive] = frame[alive].duplicated([*NUMBERS, "label"])
    gone = ~alive | twins
    before[gone].assign(rule=np.where(~alive, "condition", "drop_duplicates")[gone]).to_parquet(
        room / "quarantine.parquet", compression="zstd"
    )
    kept = frame.loc[~gone, [*NUMBERS, "label"]]
    place = pd.util.hash_pandas_object(kept[list(NUMBERS)], index=False) / 2**64
    kept = kept.assign(split=np.select([place < 0.2, place < 0.35], ["holdout", "validation"], "train"))
    kept.insert(0, "row_id", kept.index.astype(str))
    kept.to_parquet(room / "data.parquet", compression="zstd", index=False)
    repairs = pd.concat(log)
    repairs.to_parquet(room / "repairs.parquet", compression="zstd", index=False)
    return kept, {"rows": len(kept), "changed": len(repairs)}


def validate_by_gx(frame: Any) -> bool:
    """The generated suite's demands by Great Expectations on the whole frame."""
    import great_expectations as gx
    import great_expectations.expectations as gxe

    with tempfile.TemporaryDirectory() as folder:
        context = gx.get_context(mode="file", context_root_dir=folder)
        context.variables.progress_bars = {"globally": False, "metric_calculations": False}
        asset = context.data_sources.add_pandas("data").add_dataframe_asset("cleaned")
        suite = gx.ExpectationSuite(
            name="cleaned",
            expectations=[
                gxe.ExpectTableRowCountToBeBetween(min_value=100),
                gxe.ExpectColumnValuesToBeUnique(column="row_id"),
                gxe.ExpectColumnValuesToNotBeNull(column="label"),
                gxe.ExpectColumnValuesToBeInSet(column="label", value_set=list(LABELS)),
                gxe.ExpectColumnValuesToBeInSet(column="split", value_set=["train", "validation", "holdout"]),
                *(gxe.ExpectColumnValuesToNotBeNull(column=name, mostly=1e-9) for name in NUMBERS),
            ],
        )
        definition = gx.ValidationDefinition(
            name="cleaned", data=asset.add_batch_definition_whole_dataframe("all"), suite=context.suites.add(suite)
        )
        definition = context.validation_definitions.add(definition)
        return bool(definition.run(batch_parameters={"dataframe": frame}).success)
