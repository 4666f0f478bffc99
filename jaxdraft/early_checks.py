"""What stages of a recipe ask for that its target cannot give, told before a device is used or anything is written.

Each of these is found out again by the stage it is about, hours later.
"""

from jaxdraft.context import Context
from jaxdraft.errors import ConfigError
from jaxdraft.models.subclone import SIZES, check_sizes
from jaxdraft.recipe import FROM_TARGET, TARGET, DraftVocabulary, Evaluate, Generate, Train, TrainTokenizer


def check_early(context: Context) -> None:
    """Holds every stage against the shape of the target, read from its folder or from the stage that will train it.

    Raises:
      ConfigError: the target cannot be read, or a stage does not fit it.
    """
    target, vocabulary = context.target_shape, _vocabulary(context)
    context.check_draft(vocabulary)
    for stage in context.recipe.stages:
        if isinstance(stage, Train) and stage.init in FROM_TARGET:
            sizes = SIZES if stage.init == "subclone" else ("hidden_size",)
            try:
                check_sizes(target, stage.model or context.recipe.draft, sizes)
            except ConfigError as error:
                raise ConfigError(f"{stage.name}: init={stage.init!r}: {error}") from None
        if isinstance(stage, DraftVocabulary) and vocabulary is not None:
            stage.check_size(vocabulary)
        if isinstance(stage, Generate) and TARGET in stage.writers and stage.max_new_tokens >= target.max_positions:
            raise ConfigError(
                f"{stage.name}: max_new_tokens is {stage.max_new_tokens}: the target has only {target.max_positions} "
                "positions, for prompt and answer together"
            )
        if isinstance(stage, Evaluate):
            for task in stage.tasks:
                task.check_room(target.max_positions)


def _vocabulary(context: Context) -> int | None:
    """Size of the target's vocabulary; ``None`` while a tokenizer from elsewhere has to tell it."""
    tokenizer = context.recipe.tokenizer
    if context.target_shape.vocab_size is None and isinstance(tokenizer, str):
        stage = context.recipe.stage(tokenizer)
        assert isinstance(stage, TrainTokenizer)
        return stage.vocab_size
    return context.target_shape.vocab_size
