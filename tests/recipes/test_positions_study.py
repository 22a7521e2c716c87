"""The positions study end to end on embedded data, and its table."""

import pytest
from simulation import study as shared
from simulation.federations import Federation
from simulation.rows import read_rows
from simulation.tables.studies import positions_table
from studies import positions_study

FEDERATION = Federation("digits", "lenet", 1.0, 3, 0)


@pytest.fixture
def study(monkeypatch, tmp_path, few_digits):
    """Runs the study on a tiny federation."""
    monkeypatch.setattr(positions_study, "POSITIONS_FEDERATIONS", {"development": [FEDERATION]})
    monkeypatch.setattr(positions_study, "SETTINGS", [("all", "as it is"), ("auto", "budget 0.3")])
    monkeypatch.setattr(shared, "_EPOCHS", {"lenet": 1})

    def run():
        positions_study.main(["--output-dir", str(tmp_path)])
        return tmp_path / "development.csv"

    return run


def test_study_writes_a_row_for_each_setting_and_goes_on(study):
    table = study()
    rows = read_rows(table)
    assert [(row["positions"], row["sent"]) for row in rows] == positions_study.SETTINGS
    assert all(float(row["extraction_seconds"]) > 0 for row in rows)
    table.write_text("".join(table.read_text().splitlines(keepends=True)[:-1]))
    assert read_rows(study())[-1]["accuracy"] == rows[-1]["accuracy"]
    shown = positions_table(rows).splitlines()
    assert len(shown) == 4
    assert "| +0.00 | +0.00 |" in shown[2]
