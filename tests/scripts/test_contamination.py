import json
import sys

from scripts import contamination
from tests.conftest import sentences, write_rows


def test_rows_of_a_recipe_are_looked_for_without_a_run(tmp_path, capsys, monkeypatch):
    rows = sentences(40)
    write_rows(tmp_path / "rows" / "train.jsonl", rows)
    write_rows(tmp_path / "rows" / "validation.jsonl", [rows[3], {"sentence": "something else", "label": 0}])
    recipe = tmp_path / "r.yaml"
    recipe.write_text("task: sst2\noutput_dir: out\nsteps: {tuned: {run: finetune, model: a/b, max_steps: 1}}\n")
    monkeypatch.setattr(sys, "argv", ["contamination.py", str(recipe), "--data.path", str(tmp_path / "rows")])
    contamination.main()
    *shown, last = capsys.readouterr().out.splitlines()
    found = json.loads(last)
    assert found == {"trained": {"train": 40}, "scored": {"validation": {"rows": 2, "exact": 1, "near": 0}}}
    assert rows[3]["sentence"] in shown[0]
    assert "train 3:" in shown[1]
