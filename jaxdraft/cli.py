"""The command line: verbs and nothing else. What a verb needs is imported when it is used."""

import argparse
import logging
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from jaxdraft import __version__
from jaxdraft.arguments import checkpoints, folder, integers, number, numbers, positive, seed, share, step_range, whole
from jaxdraft.cli_runs import add_runs
from jaxdraft.cli_sample import SAMPLE_EXAMPLE, add_sample, run_sample
from jaxdraft.errors import RESUME, ConfigError, Interrupted
from jaxdraft.redaction import RedactingFormatter, redacted
from jaxdraft.untrusted import damaged, printable, read_json

DONE, ERROR, WRONG = 0, 1, 2
_MODEL = "Hugging Face folder, or owner/name[@revision] on the hub,"
_ENGINES = ("transformers", "vllm", "sglang", "openvino", "llama.cpp")

RUN_EXAMPLE = """examples:
  jaxdraft run quickstart --workdir runs/quickstart
  jaxdraft run configs/tinystories.py --workdir runs/mine --set target.path=MODEL_FOLDER --set text.path=FILE.txt
  jaxdraft run quickstart --workdir runs/quickstart --set seed=1 --set distill-kl.steps=50
  jaxdraft run quickstart --workdir runs/quickstart --list
  jaxdraft run quickstart --workdir runs/profiled --only corpus pretrain --profile 10:20

The same command again does only what is missing, and goes on where it was interrupted."""
EVALUATE_EXAMPLE = """examples:
  jaxdraft evaluate --target TARGET_FOLDER --draft DRAFT_FOLDER --prompts prompts.jsonl --block-sizes 3,5 --out results
  jaxdraft evaluate --target TARGET_FOLDER --draft DRAFT_FOLDER --task dolly --task xsum=DATA.parquet --out results
  jaxdraft evaluate --target TARGET_FOLDER --draft DRAFT_FOLDER --prompts chat.jsonl --prompts code.jsonl \\
      --temperature 0,0.6 --batch-size 1,8 --block-sizes 1,3,5 --out results
  jaxdraft evaluate --target TARGET_FOLDER --draft runs/mine/distill --checkpoints all --prompts prompts.jsonl \\
      --out learned

prompts.jsonl holds a line per prompt: {"prompt": "text"}, {"messages": [...]} or {"tokens": [...]}.
The same command again does only what is missing; with other settings it adds to what is in --out."""
EXPORT_EXAMPLE = """examples:
  jaxdraft export --run runs/quickstart --stage distill-tvdpp --out my-draft --dtype bfloat16
  jaxdraft export --untrained --target TARGET_FOLDER --shape 50M --out try-me

The second writes random weights: try your engine with it before you spend a day of compute."""
CHECK_EXAMPLE = """example:
  jaxdraft check --target TARGET_FOLDER --draft DRAFT_FOLDER --engine vllm

Exit code 2 if anything would not work."""
PLAN_EXAMPLE = """examples:
  jaxdraft plan tinystories --set target.path=MODEL_FOLDER --set text.path=FILE.txt --hardware 8xH100
  jaxdraft plan my_recipe.py --topology v5e:4x4 --only pretrain distill --json plan.json

The first counts parameters, tokens, storage, operations and hours. It reads no weights and no text: a folder with the
target's config.json is enough. The second also compiles the programs of these stages for TPUs that need not be there,
which takes a minute or more each, and says what they take of each chip. This needs the TPU compiler:
EXTRAS=tpu bash launch/setup.sh"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command and returns its exit code: 0 done, 1 error, 2 configuration, 75 run it again."""
    arguments = sys.argv[1:] if arguments is None else arguments
    options = _parser().parse_args(arguments)
    handler = logging.StreamHandler()
    handler.setFormatter(RedactingFormatter("%(levelname)s: %(message)s"))
    logging.basicConfig(handlers=[handler], level=logging.WARNING)
    logging.getLogger("absl").setLevel(logging.ERROR)
    _keep_compiled_programs()
    try:
        return options.verb(options, ["jaxdraft", *arguments]) or DONE
    except ConfigError as error:
        return _fail(WRONG, str(error))
    except Interrupted as error:
        return _fail(RESUME, str(error))
    except KeyboardInterrupt:
        return _fail(RESUME, "stopped")
    except BrokenPipeError:  # who reads the output, `head` for one, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except (OSError, FloatingPointError) as error:
        return _fail(ERROR, str(error))
    return DONE


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="jaxdraft",
        description="Makes a draft model for your target: pretrains, distils, measures and exports it.",
        epilog="jaxdraft VERB --help explains a verb, with an example.",
    )
    parser.add_argument("--version", action="version", version=f"jaxdraft {__version__}")
    verbs = parser.add_subparsers(metavar="VERB", required=True)

    def verb(name: str, action, what: str, example: str) -> argparse.ArgumentParser:
        formatter = argparse.RawDescriptionHelpFormatter
        sub = verbs.add_parser(name, help=what, description=what, epilog=example, formatter_class=formatter)
        sub.set_defaults(verb=action)
        return sub

    run = verb("run", _run, "run what is missing of a recipe", RUN_EXAMPLE)
    run.add_argument("recipe", help="a recipe file, or the name of one in configs/")
    run.add_argument("--workdir", required=True, help="the run directory, for all that is made: a path, or gs://…")
    run.add_argument(
        "--set", action="append", default=[], metavar="NAME=VALUE", help="override a setting; may be given repeatedly"
    )
    run.add_argument("--only", action="extend", nargs="+", default=[], metavar="STAGE", help="run only these stages")
    run.add_argument(
        "--profile",
        type=step_range,
        metavar="10:20",
        help="trace these steps of each Train stage into its folder profile/, for TensorBoard or Perfetto",
    )
    run.add_argument("--accept-license", action="store_true", help="go on though the target's licence forbids it")
    run.add_argument("--list", action="store_true", help="list the stages and their state, and stop")
    run.add_argument("--dry-run", action="store_true", help="say what would run and with which settings, and stop")

    evaluate = verb("evaluate", _evaluate, "measure drafts for a target", EVALUATE_EXAMPLE)
    evaluate.add_argument("--target", required=True, help=f"{_MODEL} of the model to speed up")
    evaluate.add_argument(
        "--draft",
        action="append",
        required=True,
        help=f"{_MODEL} of a draft, or a Train stage's folder, RUN/STAGE; may be given repeatedly",
    )
    evaluate.add_argument(
        "--checkpoints",
        type=checkpoints,
        metavar="100,200",
        help="of drafts given as RUN/STAGE: measure these steps' checkpoints, or all that were kept",
    )
    evaluate.add_argument(
        "--task",
        action="append",
        default=[],
        metavar="NAME[=PATH]",
        help="dolly, xsum, cnn-dailymail, tinystories, humaneval, wmt18-de-en or my_module:my_task, with its data from "
        "PATH or the hub and its own decoding where you give none; may be given repeatedly. With one file of "
        "--prompts, its name in the results",
    )
    evaluate.add_argument(
        "--prompts", action="append", default=[], help="JSONL file of prompts; may be given repeatedly"
    )
    evaluate.add_argument(
        "--perplexity",
        metavar="TEXT",
        help="also measure it, on a file or folder of text, wikitext-2 or wikitext-2=PATH",
    )
    evaluate.add_argument("--block-sizes", type=integers, default=(3, 5), metavar="3,5", help="γ (default: 3,5)")
    _add_speculation(evaluate)
    evaluate.add_argument("--temperature", type=numbers, default=(0.0,), metavar="0,0.6", help="0 is greedy (default)")
    _add_decoding(evaluate)
    evaluate.set_defaults(temperature=(), top_p=None, top_k=None, max_new_tokens=None)  # those of the task
    evaluate.add_argument("--limit", type=positive, help="take only the first so many prompts of each task")
    evaluate.add_argument(
        "--batch-size", type=integers, default=(1,), metavar="1,8", help="prompts decoded at once (default: 1)"
    )
    evaluate.add_argument(
        "--predict-up-to", type=whole, default=10, metavar="γ", help="largest γ to predict a speed-up for (default: 10)"
    )
    evaluate.add_argument(
        "--out",
        type=folder,
        default=Path("evaluation"),
        help="gets results.json and samples.jsonl (default: evaluation)",
    )

    sample = verb(
        "sample", run_sample, "write text, the draft's accepted tokens coloured, and the speed", SAMPLE_EXAMPLE
    )
    _add_pair(sample, draft_required=False)
    sample.add_argument("--block-size", type=positive, default=5, help="draft tokens per block (default: 5)")
    sample.add_argument("--temperature", type=number, default=0.0, help="0 is greedy (default)")
    _add_decoding(sample)
    _add_speculation(sample)
    add_sample(sample)

    export = verb("export", _export, "write a stage's model as a Hugging Face folder", EXPORT_EXAMPLE)
    export.add_argument("--run", help="a run directory: a path, or gs://…")
    export.add_argument("--stage", help="a Train stage of it")
    export.add_argument("--untrained", action="store_true", help="random weights, with --target and --shape")
    export.add_argument("--target", help="with --untrained: the model the draft is to be for")
    export.add_argument("--shape", default="50M", help="with --untrained: a preset's name or a size (default: 50M)")
    export.add_argument("--out", type=folder, required=True, help="the folder to write")
    export.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), default="float32", help="of the weights")
    export.add_argument(
        "--vocabulary",
        choices=("full", "draft"),
        default="full",
        help="of a draft with a draft vocabulary: plain weights for every engine, or its own head and the map d2t",
    )
    export.add_argument("--evaluation", help="an Evaluate stage whose figures go into the model card")
    export.add_argument("--block-size", type=positive, default=5, help="for assisted generation (default: 5)")

    check = verb("check", _check, "say which engines would take a draft for a target, and what to do", CHECK_EXAMPLE)
    _add_pair(check, draft_required=True)
    check.add_argument(
        "--engine", action="append", choices=(*_ENGINES, "all"), help="may be given repeatedly (default: all)"
    )

    plan = verb("plan", _plan, "say what a recipe takes, before anything runs", PLAN_EXAMPLE)
    plan.add_argument("recipe", help="a recipe file, or the name of one in configs/")
    plan.add_argument(
        "--set", action="append", default=[], metavar="NAME=VALUE", help="override a setting; may be given repeatedly"
    )
    plan.add_argument("--hardware", metavar="8xH100", help="accelerators to count hours for (default: 8xH100)")
    plan.add_argument("--topology", metavar="v5e:4x4", help="TPUs to compile for; 2xv5e:4x4 is two slices")
    plan.add_argument(
        "--only",
        action="extend",
        nargs="+",
        default=[],
        metavar="STAGE",
        help="with --topology: compile only these stages",
    )
    plan.add_argument("--json", type=Path, metavar="FILE", help="write the figures there too")

    add_runs(verb, parser.parse_args)
    return parser


def _add_pair(parser: argparse.ArgumentParser, draft_required: bool) -> None:
    parser.add_argument("--target", required=True, help=f"{_MODEL} of the model to speed up")
    parser.add_argument("--draft", required=draft_required, help=f"{_MODEL} of the draft")


def _add_decoding(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--top-p", type=share, default=1.0, help="nucleus (default: 1, everything)")
    parser.add_argument("--top-k", type=whole, default=0, help="most likely tokens kept (default: 0, all)")
    parser.add_argument("--max-new-tokens", type=positive, default=128, help="per prompt (default: 128)")
    parser.add_argument("--seed", type=seed, default=0, help="of the sampling (default: 0)")


def _add_speculation(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--verification", choices=("token", "block"), default="token", help="rule of acceptance (default: token)"
    )
    parser.add_argument(
        "--drafting", choices=("sampled", "greedy"), default="sampled", help="how it proposes (default: sampled)"
    )
    parser.add_argument(
        "--stop-below",
        type=float,
        default=0.0,
        metavar="P",
        help="end a block after a draft token that the draft gave less probability (default: 0, never)",
    )


def _run(options: argparse.Namespace, command: list[str]) -> None:
    from jaxdraft.distributed import initialize
    from jaxdraft.licences import objection, target_licence
    from jaxdraft.recipe_file import load_recipe
    from jaxdraft.remote import is_url
    from jaxdraft.run import plan_all, run
    from jaxdraft.stopping import owned
    from jaxdraft.tracking import say

    recipe = load_recipe(options.recipe, options.set)
    if options.list or options.dry_run:
        if told := objection(recipe, target_licence(recipe)):
            print(f"note: {told}")
        chosen = {recipe.stage(name).name for name in options.only}
        for plan in plan_all(recipe, options.workdir):
            if chosen and plan.stage.name not in chosen:
                continue
            print(redacted(f"{plan.stage.name:<20} {type(plan.stage).__name__:<15} {plan.state:<11} {plan.reason}"))
            if options.dry_run and plan.state != "done":
                print(redacted(f"    {plan.stage}"))
        return
    with owned(leaves=True):
        initialize()
        report = run(recipe, options.workdir, options.only, command, options.profile, options.accept_license)
    if report is not None:
        print(report)
        if is_url(options.workdir):
            say(f"kept in {options.workdir}")


def _evaluate(options: argparse.Namespace, command: list[str]) -> None:
    from jaxdraft.decode import Speculation
    from jaxdraft.evaluate.command import evaluate
    from jaxdraft.evaluate.perplexity import source_named
    from jaxdraft.evaluate.sweep import Settings
    from jaxdraft.evaluate.tasks import asked_for
    from jaxdraft.models.hub import model_folder
    from jaxdraft.past_drafts import drafts_at
    from jaxdraft.stopping import owned

    decoding = {name: getattr(options, name) for name in ("top_p", "top_k", "max_new_tokens", "limit")}
    tasks = asked_for(options.task, options.prompts, {key: x for key, x in decoding.items() if x is not None})
    how = options.verification, options.drafting, options.stop_below
    settings = Settings(
        tuple(Speculation(size, *how) for size in options.block_sizes),
        options.batch_size,
        options.seed,
        predict_up_to=options.predict_up_to,
    )
    with owned(leaves=True):
        evaluate(
            target=model_folder(options.target),
            drafts=[draft for place in options.draft for draft in drafts_at(place, options.checkpoints)],
            tasks=tasks,
            temperatures=options.temperature,
            settings=settings,
            out=options.out,
            perplexity=None if options.perplexity is None else source_named(options.perplexity),
        )


def _export(options: argparse.Namespace, command: list[str]) -> None:
    from jaxdraft.data.records import MANIFEST
    from jaxdraft.export import export_stage, export_untrained
    from jaxdraft.home import open_home
    from jaxdraft.models.hub import model_folder

    if options.untrained:
        from jaxdraft.models.hf import load_config

        if options.target is None:
            raise ConfigError("--untrained needs --target, the model the draft is to be for")
        target, how = model_folder(options.target), {"dtype": options.dtype, "block_size": options.block_size}
        export_untrained(target, options.shape, options.out, **how)
        made = load_config(options.out)
        size = f"{made.num_parameters:,} parameters: {made.num_layers} layers, hidden size {made.hidden_size}"
        print(f"{options.out}: {size}, {made.num_heads} heads")
        return
    if options.run is None or options.stage is None:
        raise ConfigError("name what to export: --run and --stage, or --untrained and --target")
    home = open_home(options.run, None)
    home.fetch_records()
    if (recipe := home.folder / "recipe.json").is_file():
        with damaged(recipe):
            for made in read_json(recipe)["stages"]:  # the card names the licences of all data
                home.fetch(made["name"], (MANIFEST,))
    for stage in (options.stage, options.evaluation):
        if stage is not None:
            home.fetch(stage)
    export_stage(
        home.folder,
        options.stage,
        options.out,
        dtype=options.dtype,
        block_size=options.block_size,
        evaluation=options.evaluation,
        vocabulary=options.vocabulary,
    )
    print(options.out)


def _check(options: argparse.Namespace, command: list[str]) -> None:
    from jaxdraft.check import ENGINES, run_check
    from jaxdraft.models.hub import model_folder

    asked = options.engine or ["all"]
    engines = ENGINES if "all" in asked else tuple(engine for engine in ENGINES if engine in asked)
    if not run_check(model_folder(options.target), model_folder(options.draft), engines):
        raise ConfigError("something would not work: see above")


def _plan(options: argparse.Namespace, command: list[str]) -> None:
    if options.topology is not None:
        # Before jax starts: the compiler is asked for TPUs that are not here, and this process computes nothing.
        os.environ |= {
            "JAX_PLATFORMS": "cpu",
            "TPU_SKIP_MDS_QUERY": "1",
            "TPU_ACCELERATOR_TYPE": "v5litepod-8",  # any will do: the topology that is compiled for is named apart
            "TPU_WORKER_HOSTNAMES": "localhost",
            "JAX_ENABLE_COMPILATION_CACHE": "0",  # which cannot read what was compiled for other devices
            "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",  # no chip is opened, so nothing is to be locked
        }
    from jaxdraft.plan.command import plan

    plan(options.recipe, options.set, options.hardware, options.topology, options.only, options.json)


def _keep_compiled_programs() -> None:
    """XLA's compilations are kept between runs, where the user has not said otherwise."""
    os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(Path("~/.cache/jaxdraft/xla").expanduser()))
    os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.2")


def _fail(code: int, message: str) -> int:
    print(printable(redacted(f"jaxdraft: {message}"), keep="\n\t"), file=sys.stderr)
    return code


def command() -> None:
    """The program. What was stopped is left without taking the interpreter apart, under XLA's threads at work."""
    code = main()
    if code == RESUME:
        from jaxdraft.distributed import is_alone

        if is_alone():  # else the other processes are told
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)
    sys.exit(code)


if __name__ == "__main__":
    command()
