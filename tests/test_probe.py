"""What a draft is measured on while it learns."""

from jaxdraft.probe import efficiency_summary, first_answers
from jaxdraft.recipe import Generate
from jaxdraft.tracking import write_jsonl


def test_the_first_answers_of_each_temperature_are_measured_and_only_the_targets(tmp_path):
    stage = Generate("probe", prompts=(), length=8, temperatures=(0.0, 0.6))
    lines = [
        {"id": f"{i}@{t:g}", "temperature": t, "writer": "target", "number": 2 * i + (t > 0)}
        for i in range(5)
        for t in stage.temperatures
    ]
    lines[0]["writer"] = "draft"
    lines[3]["error"] = "empty answer"
    for i in range(2):  # files hold questions of one length, and not in the order in which they were asked
        write_jsonl(tmp_path / f"responses-{i:05d}-of-00002.jsonl", lines[5 * (1 - i) : 5 * (1 - i) + 5])
    ids = [line["id"] for line in first_answers(tmp_path, stage, 2)]
    assert ids == ["1@0", "2@0", "0@0.6", "2@0.6"]
    assert len(first_answers(tmp_path, stage, 32)) == 8


def test_the_summary_is_the_last_value_at_the_largest_block_size():
    lines = [
        {"step": step, "temperature": t, "top_p": 0.9, "block_size": g, "block_efficiency_offline": 1 + step + t + g}
        for step in (0, 3)
        for t in (0.0, 0.5)
        for g in (5, 3)
    ]
    assert efficiency_summary(lines) == {"block efficiency at γ 5": "9.00 (greedy), 9.50 (T 0.5, top-p 0.9)"}
    assert efficiency_summary([]) == {}
