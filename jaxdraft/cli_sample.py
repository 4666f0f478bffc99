"""``jaxdraft sample`` on the command line: the arguments that no other verb has, and what they call."""

import argparse

SAMPLE_EXAMPLE = """examples:
  jaxdraft sample --target TARGET_FOLDER --draft DRAFT_FOLDER --prompt "Once upon a time" --block-size 5
  jaxdraft sample --target TARGET_FOLDER --draft DRAFT_FOLDER --system "Answer in one sentence."
  jaxdraft sample --target TARGET_FOLDER --draft DRAFT_FOLDER --no-compare --prompt - < prompt.txt > answer.txt

Green is what the draft wrote and the target accepted. Without --prompt each line that you type is answered. The text
goes to standard output, all else to standard error. Speeds are of the decoding loop; compiling and reading the prompt
come before, and are told apart."""


def add_sample(parser: argparse.ArgumentParser) -> None:
    """The arguments of ``sample``, besides those of the pair and of decoding."""
    parser.add_argument(
        "--prompt", metavar="TEXT", help="what to go on from; - reads standard input (default: you are asked)"
    )
    parser.add_argument(
        "--chat",
        action=argparse.BooleanOptionalAction,
        help="answer as in a conversation, in the target's chat template (default: where it has one)",
    )
    parser.add_argument("--system", metavar="TEXT", help="the system prompt of a conversation")
    parser.add_argument(
        "--compare",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="let the target write alone first (default: yes)",
    )
    parser.add_argument("--rejected", action="store_true", help="show the draft's refused tokens too, struck out")
    parser.add_argument("--no-color", action="store_true", help="plain text, as with NO_COLOR set")


def run_sample(options: argparse.Namespace, command: list[str]) -> None:
    """``jaxdraft sample``."""
    from jaxdraft.decode import Speculation
    from jaxdraft.evaluate.sample import Appearance, sample
    from jaxdraft.models.hub import model_folder

    sample(
        target=model_folder(options.target),
        draft=None if options.draft is None else model_folder(options.draft),
        prompt=options.prompt,
        speculation=Speculation(options.block_size, options.verification, options.drafting, options.stop_below),
        decoding={name: getattr(options, name) for name in ("max_new_tokens", "temperature", "top_p", "top_k")},
        seed=options.seed,
        chat=options.chat,
        system=options.system,
        appearance=Appearance(not options.no_color, options.rejected, options.compare),
    )
