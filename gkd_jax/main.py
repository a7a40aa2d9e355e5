"""Command line: runs the experiment or study that gin files describe.

    python -m gkd_jax.main --gin_file=gin_configs/wmt_ende.gin --gin.MODEL_DIR='"runs/wmt"'

Without --gin_file, the command runs gin_configs/quickstart.gin, which needs no download.
"""

import logging as python_logging
import os
import pathlib
import shlex
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

# TensorFlow and gRPC, which some tasks need, log a lot. They read these variables when they are
# first imported.
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
os.environ.setdefault("GRPC_VERBOSITY", "ERROR")

from absl import app, flags, logging

_DEFAULT_GIN_FILE = "gin_configs/quickstart.gin"
_SECONDS_TO_TELL = 5.0
_PACKAGE = str(pathlib.Path(__file__).parent) + os.sep

_GIN_FILE = flags.DEFINE_multi_string(
    "gin_file", [], f"Gin file; later ones override earlier ones. Default: {_DEFAULT_GIN_FILE}."
)
_GIN_BINDINGS = flags.DEFINE_multi_string(
    "gin_bindings", [], "Gin binding 'NAME = value', after all files; --gin.NAME=value is the same."
)
_GIN_SEARCH_PATHS = flags.DEFINE_list(
    "gin_search_paths", [], "Folders in which gin files are searched, before the current one."
)
_OF_AN_EXPERIMENT = (
    "train",
    "eval",
    "generate",
    "interactive",
    "store_teacher",
    "export",
    "compile_ahead",
)
_RUN_MODE = flags.DEFINE_enum(
    "run_mode",
    None,
    [*_OF_AN_EXPERIMENT, "study"],
    "What to do. Default: study if the gin files bind a Study, else train.",
)
_DRY_RUN = flags.DEFINE_bool("dry_run", False, "Check everything, print the plan and stop.")
_ALLOW_CHANGED_CONFIG = flags.DEFINE_bool(
    "allow_changed_config",
    False,
    "Resume in a MODEL_DIR whose saved configuration differs; the old file is kept.",
)
_TRACEBACK = flags.DEFINE_bool("traceback", False, "Print the traceback of an error.")
_MULTIPROCESS = flags.DEFINE_bool(
    "multiprocess", False, "Join the other processes of a TPU pod or cluster, found by JAX."
)
_COORDINATOR_ADDRESS = flags.DEFINE_string(
    "coordinator_address", None, "host:port of process 0, if JAX cannot find it by itself."
)
_PROCESS_COUNT = flags.DEFINE_integer(
    "process_count", None, "Number of processes, with --coordinator_address."
)
_PROCESS_INDEX = flags.DEFINE_integer(
    "process_index", None, "Index of this process, from 0, with --coordinator_address."
)
_HEARTBEAT_TIMEOUT_S = flags.DEFINE_integer(
    "heartbeat_timeout_s",
    None,
    "Over several processes: seconds without a sign of life after which one counts as lost and all "
    "others end. Default: JAX's own, 100.",
    lower_bound=1,
)


def rewrite_gin_flags(argv: Sequence[str]) -> list[str]:
    """Rewrites `--gin.NAME=value` as `--gin_bindings=NAME = value`, as T5X does.

    Raises:
      ValueError: a flag has no '='.
    """
    rewritten = []
    for argument in argv:
        if argument.startswith(("--gin.", "-gin.")):
            name, equals, value = argument.partition("gin.")[2].partition("=")
            if not equals:
                raise ValueError(
                    f"{argument} must have a value after '='. Write {argument}=value, text within "
                    "quotes of its own."
                )
            argument = f"--gin_bindings={name} = {value}"
        rewritten.append(argument)
    return rewritten


def _run(command: str) -> None:
    from gkd_jax.experiment.experiment import Experiment
    from gkd_jax.experiment.gin_files import configuration
    from gkd_jax.run_modes.study import Study

    config = configuration.parse(
        roots=(Study, Experiment),
        gin_files=_GIN_FILE.value or [_DEFAULT_GIN_FILE],
        bindings=_GIN_BINDINGS.value,
        search_paths=_GIN_SEARCH_PATHS.value,
    )
    run_mode = _choose_run_mode(binds_study=config.root is Study)
    # Must run before any code uses devices.
    _join_processes()
    experiment = config.build()
    if run_mode in ("train", "study") and not _ALLOW_CHANGED_CONFIG.value:
        configuration.check_config(experiment.model_dir, config)
    if _DRY_RUN.value and run_mode == "compile_ahead":
        raise ValueError(
            "--run_mode=compile_ahead runs nothing and reads no data, as --dry_run does; got both. "
            "Leave --dry_run out, or the run mode."
        )
    if _DRY_RUN.value:
        from gkd_jax.run_modes import dry_run

        print(dry_run.dry_run(experiment, run_mode="train" if run_mode == "study" else run_mode))
        return

    def save_config() -> None:
        import jax

        if jax.process_index() == 0:
            configuration.save_config(experiment.model_dir, config, command=command)

    _report(_call(run_mode, experiment, before_start=save_config))


def _choose_run_mode(*, binds_study: bool) -> str:
    run_mode = _RUN_MODE.value or ("study" if binds_study else "train")
    if binds_study != (run_mode == "study"):
        bound = "a Study" if binds_study else "an Experiment"
        raise ValueError(
            f"--run_mode={run_mode} does not suit the gin files, which bind {bound}. Leave it out"
            + ("." if binds_study else f", or set it to one of {', '.join(_OF_AN_EXPERIMENT)}.")
        )
    return run_mode


def _join_processes() -> None:
    timeout = _HEARTBEAT_TIMEOUT_S.value
    if _MULTIPROCESS.value or _COORDINATOR_ADDRESS.value:
        import jax

        options: dict[str, Any] = {} if timeout is None else {"heartbeat_timeout_seconds": timeout}
        jax.distributed.initialize(
            coordinator_address=_COORDINATOR_ADDRESS.value,
            num_processes=_PROCESS_COUNT.value,
            process_id=_PROCESS_INDEX.value,
            **options,
        )
    elif timeout is not None:
        raise ValueError(
            f"--heartbeat_timeout_s is for several processes; got {timeout} for one. Leave it out, "
            "or give --multiprocess or --coordinator_address."
        )


def _call(run_mode: str, experiment: Any, *, before_start: Callable[[], None]) -> str:
    """Runs the mode and returns the text to print at the end.

    Training calls `before_start`, which saves the configuration, only after all checks. Otherwise a
    configuration that cannot run would be saved, and its correction would be refused as a change.
    """
    if run_mode == "study":
        from gkd_jax.run_modes import study

        rows = study.run_study(experiment, before_start=before_start)
        return study.format_table(experiment, rows)
    if run_mode == "eval":
        from gkd_jax.run_modes import evaluate

        scores = evaluate.evaluate(experiment).scores
        return "\n".join(f"{name}: {score}" for name, score in scores.items())
    if run_mode == "generate":
        from gkd_jax.run_modes import generate

        return f"written: {generate.generate(experiment)}"
    if run_mode == "store_teacher":
        from gkd_jax.run_modes import store_teacher

        return f"written: {store_teacher.store_teacher(experiment)}"
    if run_mode == "interactive":
        from gkd_jax.run_modes import interactive

        interactive.interactive(experiment)
        return ""
    if run_mode == "compile_ahead":
        from gkd_jax.run_modes import compile_ahead

        return compile_ahead.compile_ahead(experiment)
    if run_mode == "export":
        from gkd_jax.run_modes import export

        return f"written: {export.export(experiment)}"
    from gkd_jax.run_modes import train

    scores_at_end = train.train(experiment, before_start=before_start).scores
    return "\n".join(f"eval/{name}: {value:.6g}" for name, value in scores_at_end.items())


def _report(text: str) -> None:
    import jax

    if text and jax.process_index() == 0:
        print(text)


def _is_users_error(error: BaseException) -> bool:
    """Returns whether this package raised the error because of the user's input.

    The message of such an error helps more than a traceback. A ValueError raised within JAX is not
    the user's error.
    """
    if isinstance(error, FileNotFoundError | PermissionError | NotADirectoryError):
        return True
    frames = list(traceback.walk_tb(error.__traceback__))
    return isinstance(error, ValueError) and bool(
        frames and frames[-1][0].f_code.co_filename.startswith(_PACKAGE)
    )


def main(argv: Sequence[str]) -> None:
    """Runs the command; exits with status 2 for an error in the user's input and 1 for others."""
    _set_up_logging()
    if len(argv) > 1:
        _exit_with(f"unexpected argument {argv[1]!r}. Gin files are given by --gin_file=...")
    arguments = shlex.join(sys.argv[1:])
    from gkd_jax.training import interruption

    try:
        _run(f"python -m gkd_jax.main {arguments}".strip())
    except interruption.InterruptedRunError as error:
        _exit_with(str(error), status=interruption.EXIT_STATUS)
    except (ValueError, OSError) as error:
        _fail(error, status=None if _TRACEBACK.value or not _is_users_error(error) else 2)
    except FloatingPointError as error:
        _fail(error, status=None if _TRACEBACK.value else 1)
    except Exception as error:
        _fail(error, status=None)


def _fail(error: Exception, *, status: int | None) -> NoReturn:
    """Exits with the error's message and this status, or with a traceback if the status is None.

    If the run has several processes, this process exits without Python's shutdown. During the
    shutdown JAX would wait for the other processes, which wait for this one. Minutes later it would
    abort all of them with an uninformative status.
    """
    import jax

    if not jax.distributed.is_initialized():
        if status is None:
            raise error
        _exit_with(_message(error), status=status)
    if status is None:
        traceback.print_exception(error)
    else:
        print(f"error: {_message(error)}", file=sys.stderr)
    sys.stdout.flush()
    sys.stderr.flush()
    if jax.process_index() == 0:
        # The exit of process 0 ends the others. Wait until they have printed their own errors.
        time.sleep(_SECONDS_TO_TELL)
    os._exit(1 if status is None else status)


def _message(error: Exception) -> str:
    """Returns the text of an error with its notes."""
    return "\n".join([str(error), *getattr(error, "__notes__", ())])


def _exit_with(message: str, *, status: int = 2) -> NoReturn:
    print(f"error: {message}", file=sys.stderr)
    sys.exit(status)


def _set_up_logging() -> None:
    """Adds the time of day to log lines, and limits other packages to warnings and errors."""
    if flags.FLAGS["verbosity"].using_default_value:
        logging.set_verbosity(logging.INFO)
    handler = logging.get_absl_handler()
    handler.setFormatter(python_logging.Formatter("%(asctime)s %(message)s", "%H:%M:%S"))
    handler.addFilter(
        lambda record: (
            record.levelno >= python_logging.WARNING or record.pathname.startswith(_PACKAGE)
        )
    )


def run() -> None:
    """Runs the `gkd_jax` command."""

    from gkd_jax.common.growing_files import prefer_gcsfs

    prefer_gcsfs()

    def parse_flags(argv: list[str]) -> list[str]:
        try:
            return app.parse_flags_with_usage(rewrite_gin_flags(argv))
        except ValueError as error:
            _exit_with(str(error))

    app.run(main, flags_parser=parse_flags)


if __name__ == "__main__":
    run()
