"""Recipes and overrides: what fits lands typed where it belongs, what does not is answered by name."""

import dataclasses
from pathlib import Path

import pytest

from jaxdraft import recipe_file
from jaxdraft.errors import ConfigError
from jaxdraft.losses import DPACE, KL, TVDPlusPlus
from jaxdraft.models.hf import load_model
from jaxdraft.recipe import HFModel, Score, TopK, Train
from jaxdraft.recipe_file import CONFIGS, find_recipe, load_recipe
from jaxdraft.settings import to_json
from jaxdraft.tokenizers import load_tokenizer

TINY = str(Path(__file__).with_name("tiny_recipe.py"))


def setting(assignment, name):
    return getattr(load_recipe(TINY, [assignment]).stage("distill"), name)


@pytest.mark.parametrize(
    ("assignment", "name", "value"),
    [
        ("distill.steps=1_000", "steps", 1000),
        ("distill.learning_rate=3e-4", "learning_rate", 3e-4),
        ("distill.remat=dots", "remat", "dots"),
        ("distill.decay=cosine", "decay", "cosine"),
        ("distill.keep_every=none", "keep_every", None),
        ("distill.loss=KL", "loss", KL()),
        ("distill.loss.temperature=0.5", "loss", TVDPlusPlus(temperature=0.5)),
        ("distill.data={'responses': 0.4, 'corpus': 0.6}", "data", {"responses": 0.4, "corpus": 0.6}),
        ("distill.data=corpus", "data", "corpus"),
        ("distill.loss.weights=DPACE", "loss", TVDPlusPlus(weights=DPACE())),
    ],
)
def test_overrides_land_typed_where_they_belong(assignment, name, value):
    assert setting(assignment, name) == value


def test_arguments_fields_and_nested_values_can_be_set():
    recipe = load_recipe(
        TINY,
        [
            "steps=9",
            "seed=7",
            "draft.hidden_size=32",
            "mesh.fsdp=1",
            "responses.temperatures=0,0.5",
            "evaluate.tasks.greedy.max_new_tokens=5",
            "evaluate.tasks.0.prompts.limit=2",
            "evaluate.block_sizes=3,5",
        ],
    )
    assert recipe.seed == 7
    assert recipe.draft.hidden_size == 32
    assert recipe.stage("target").steps == 9
    assert recipe.stage("responses").temperatures == (0.0, 0.5)
    tasks = recipe.stage("evaluate").tasks
    assert tasks[1].max_new_tokens == 5
    assert tasks[0].prompts.limit == 2
    assert recipe.stage("evaluate").block_sizes == (3, 5)


def test_settings_that_may_be_none_by_their_first_field():
    recipe = load_recipe(TINY, ["responses.keep_logits=8", "responses.keep_logits.temperature=0.5"])
    assert recipe.stage("responses").keep_logits == TopK(8, 0.5)
    assert load_recipe(TINY, ["responses.keep_logits=none"]).stage("responses").keep_logits is None


def test_block_efficiency_is_measured_on_the_answers_behind_a_score():
    recipe = load_recipe(TINY, [])
    responses = recipe.stage("responses")
    scored = Score("scored", data="responses", keep_logits=TopK(4))
    learner = Train("learner", data="scored", loss=KL(), target_logits="stored", steps=1, batch_size=2)
    recipe = dataclasses.replace(recipe, stages=(*recipe.stages, scored, learner))
    assert recipe.probe(learner) == responses


@pytest.mark.parametrize(
    ("assignment", "answer"),
    [
        ("distil.steps=3", "did you mean 'distill'"),
        ("distill.step=3", "did you mean 'steps'"),
        ("seeed=3", "did you mean 'seed'"),
        ("draft.hiden_size=3", "did you mean 'hidden_size'"),
        ("evaluate.tasks.gredy.top_p=1", "did you mean 'greedy'"),
        ("distill.data.corpuss=1", "did you mean 'corpus'"),
        ("distill.loss=TVDPlus", "did you mean 'TVDPlusPlus'"),
        ("distill.init=pretrian", "did you mean 'pretrain'"),
        ("distill.draft_vocabulary=vocabulry", "did you mean 'vocabulary'"),
        ("vocabulary.data=target", "no earlier Prepare or Generate or Score or Subset stage 'target'"),
        ("vocabulary.size=0", "size is 0"),
        ("export.vocabulary=half", "cannot read 'half'"),
        ("distill.init=subclon", "did you mean 'subclone'"),
        ("target.init=subclone", "stage 'target' reads 'target', which no earlier stage makes"),
        ("evaluate.drafts=pretrain,distil", "did you mean 'distill'"),
        ("export.draft=corpus", "no earlier Train stage 'corpus'"),
        ("distill.steps=many", "cannot read 'many' as int"),
        ("distill.steps=1e3", "cannot read '1e3' as int"),
        ("distill.remat=perhaps", "cannot read 'perhaps' as one of none, dots, full"),
        ("distill.decay=square", "cannot read 'square'"),
        ("distill.steps=0", "steps is 0"),
        ("distill.learning_rate=-1", "learning_rate is -1"),
        ("distill.warmup_steps=6", "warmup_steps is 6"),
        ("distill.b1=1", "b1 and b2"),
        ("distill.batch_size=0", "batch_size is 0"),
        ("distill.accumulate=3", "accumulate divides batch_size"),
        ("distill.save_every=0", "save_every"),
        ("distill.probe=corpus", "no earlier Generate stage 'corpus'"),
        ("target.probe=responses", "no earlier Generate stage 'responses'"),
        ("distill.probe_every=0", "probe_every"),
        ("distill.model=512", "cannot read '512'"),
        ("responses.keep_logits=0", "keep_logits=0: TopK: k is 0: it must be at least 1"),
        ("distill.probe_block_sizes=3,0", "probe_block_sizes"),
        ("draft.num_kv_heads=3", "num_heads"),
        ("draft.hidden_size=15", "hidden_size"),
        ("corpus.length=1", "length is 1"),
        ("responses.temperatures=-1", "temperatures"),
        ("responses.top_p=0", "top_p is 0"),
        ("responses.writer=pretrian", "did you mean 'pretrain'"),
        (
            "responses.writer=corpus",
            "responses.writer: no earlier Train stage 'corpus': There are: target, pretrain",
        ),
        ("responses.writer=distill", "responses.writer: no earlier Train stage 'distill'"),
        ("responses.writer={'target': 0.5, 'pretrain': 0.4}", "shares must be positive and sum to 1"),
        ("responses.writer={'target': 1.5, 'pretrain': -0.5}", "shares must be positive and sum to 1"),
        ("responses.keep_logits.k=0", "k is 0"),
        ("responses.max_new_tokens=0", "must be positive"),
        ("evaluate.block_sizes=0", "block_sizes"),
        ("evaluate.tasks.open.top_p=2", "top_p"),
        ("distill.data.corpus=0.7", "weights must be positive and sum to 1"),
        ("distill.batch_size=8", "batch_size=8 cannot hold the mix"),
        ("corpus.length=32", "different lengths cannot be mixed"),
        ("distill.loss=broken_loss:MyLoss", "cannot import"),
        ("distill", "write NAME=VALUE"),
        ("distill=3", "name a field of stage"),
        ("seed.x=3", "int has no field 'x'"),
        ("seed=-1", "seed is -1"),
        ("mesh=8", "cannot read '8'"),
    ],
)
def test_what_does_not_fit_is_answered_by_name(assignment, answer):
    with pytest.raises(ConfigError, match=answer.replace("(", r"\(")):
        load_recipe(TINY, [assignment])


def test_changes_of_one_stage_are_checked_together():
    both = ["distill.warmup_steps=1", "distill.steps=2", "distill.data.corpus=0.5", "distill.data.responses=0.5"]
    for assignments in (both, both[::-1]):
        assert load_recipe(TINY, assignments).stage("distill").warmup_steps == 1


def test_a_stage_that_learns_from_answers_is_measured_on_them():
    def probed(*assignments):
        recipe = load_recipe(TINY, ["distill.loss=CrossEntropy", *assignments])
        for stage in map(recipe.stage, ("pretrain", "distill")):
            found = recipe.probe(stage)
            assert recipe.uses_target(stage) == ("target" in recipe.needs(stage)) == (found is not None)
            assert found is None or found.name in recipe.needs(stage)
            yield found and found.name

    assert [*probed()] == [None, "responses"]
    assert [*probed("distill.data=corpus")] == [None, None]
    assert [*probed("distill.data=corpus", "distill.probe=responses")] == [None, "responses"]
    assert [*probed("distill.probe_block_sizes=()")] == [None, None]


def test_every_shipped_recipe_loads():
    somebody_elses = ["target.path=somewhere", "text.path=something.txt"]
    arguments = {
        "tinystories": somebody_elses,
        "loss_comparison": somebody_elses,
        "chat_target": ["tokenizer.path=somewhere", "text.path=something.txt"],
    }
    for path in CONFIGS.glob("[!_]*.py"):
        recipe = load_recipe(path.stem, arguments.get(path.stem, []))
        assert to_json(recipe)["title"]


def test_the_target_that_is_shipped_is_the_one_that_its_recipe_makes():
    made, quickstart = load_recipe("python_target"), load_recipe("quickstart")
    folder = Path(quickstart.target.path)
    config, _ = load_model(folder)
    assert config == dataclasses.replace(made.draft, vocab_size=made.stage("tokenizer").vocab_size, head_dim=64)
    assert (
        10 * dataclasses.replace(quickstart.draft, vocab_size=config.vocab_size).num_parameters < config.num_parameters
    )
    card = (folder / "README.md").read_text()
    assert made.description in card
    assert load_tokenizer(folder).fingerprint() in card


def test_a_required_argument_is_asked_for():
    with pytest.raises(ConfigError, match=r"needs --set target\.path="):
        load_recipe("tinystories")
    given = ["target.path=a", "text.path=b.txt", "text.field=story"]
    assert load_recipe("tinystories", given).target == HFModel("a")


def test_a_recipe_that_does_not_exist_gets_a_suggestion():
    with pytest.raises(ConfigError, match="did you mean 'quickstart'"):
        find_recipe("quickstrat")


def test_what_recipes_share_is_not_offered_as_one(tmp_path, monkeypatch):
    monkeypatch.setattr(recipe_file, "CONFIGS", tmp_path)
    for name in ("_shared.py", "shared.py"):
        (tmp_path / name).touch()
    assert find_recipe("shared") == tmp_path / "shared.py"
    with pytest.raises(ConfigError, match="did you mean 'shared'"):
        find_recipe("_shared")


def test_a_file_without_a_recipe_is_refused(tmp_path):
    (tmp_path / "empty.py").write_text("x = 1\n")
    with pytest.raises(ConfigError, match="defines no function recipe"):
        load_recipe(str(tmp_path / "empty.py"))


def test_stages_are_checked_against_each_other():
    recipe = load_recipe(TINY)
    with pytest.raises(ConfigError, match="two stages are called 'target'"):
        dataclasses.replace(recipe, stages=(*recipe.stages, recipe.stage("target")))
    with pytest.raises(ConfigError, match="needs tokenizer="):
        dataclasses.replace(recipe, tokenizer=None)
    with pytest.raises(ConfigError, match="reads 'nothing', which no earlier stage"):
        dataclasses.replace(recipe, target="nothing")
    with pytest.raises(ConfigError, match="which no earlier stage makes"):
        dataclasses.replace(recipe, stages=(recipe.stage("corpus"), recipe.stage("tokenizer"), recipe.stage("target")))
