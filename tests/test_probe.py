"""What a draft is measured on while it learns."""

from jaxdraft.probe import efficiency_summary, first_answers
from jaxdraft.recipe import Generate
from jaxdraft.tracking import write_jsonl


def test_the_first_answers_of_each_temperature_are_measured_and_only_the_targets(tmp_path):
    stage = Generate("probe", prompts=(), length=8, temperatures=(0.0, 0.6))
    lines = [{"id": f"{i}@{t:g}", "temperature": t} for i in range(5) for t in stage.temperatures]
    lines[0]["writer"] = "draft"
    lines[1]["writer"] = "target"
    for i in range(2):
        write_jsonl(tmp_path / f"responses-{i:05d}-of-00003.jsonl", lines[5 * i : 5 * i + 5])
    (tmp_path / "responses-00002-of-00003.jsonl").write_text("not needed\n")
    ids = [line["id"] for line in first_answers(tmp_path, stage, 2)]
    assert ids == ["1@0", "2@0", "0@0.6", "1@0.6"]
    (tmp_path / "responses-00002-of-00003.jsonl").unlink()
    assert len(first_answers(tmp_path, stage, 32)) == 9


def test_the_summary_is_the_last_value_at_the_largest_block_size():
    lines = [
        {"step": step, "temperature": t, "top_p": 0.9, "block_size": g, "block_efficiency_offline": 1 + step + t + g}
        for step in (0, 3)
        for t in (0.0, 0.5)
        for g in (5, 3)
    ]
    assert efficiency_summary(lines) == {"block efficiency at γ 5": "9.00 (greedy), 9.50 (T 0.5, top-p 0.9)"}
    assert efficiency_summary([]) == {}
