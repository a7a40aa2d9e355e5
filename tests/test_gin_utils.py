"""gin files: what is read, what is refused, and that a saved configuration reruns the same run."""

import dataclasses
import pathlib
import pickle
import sys
import time

import pytest

from gkd_jax.experiment.gin_files import configuration
from gkd_jax.experiment.gin_files.statements import GinError, MissingValues

_TOY = """
import dataclasses

@dataclasses.dataclass(frozen=True)
class Model:
    width: int
    dtype: str = "bfloat16"
    rate: float = 0.0

    def __post_init__(self):
        if not 0 <= self.rate < 1:
            raise ValueError(f"Model.rate must be in [0, 1); got {self.rate}. Set it to 0.1.")

@dataclasses.dataclass(frozen=True)
class Adam:
    learning_rate: float = 1e-3

@dataclasses.dataclass(frozen=True)
class Adafactor:
    learning_rate: float = 1e-2
    decay: float = 0.8

@dataclasses.dataclass(frozen=True)
class Run:
    model_dir: str
    student: Model
    teacher: Model | None = None
    optimizer: object = Adafactor()
    fallback: Adam = Adam(learning_rate=0.5)
    extras: tuple = ()
    lengths: dict | None = None
    num_steps: int = 10

@dataclasses.dataclass(frozen=True)
class Many:
    runs: tuple

def double(value, *, times=2):
    return value * times
"""

_HEAD = """
from __gin__ import dynamic_registration
import gin_toy
"""

_RUN = (
    _HEAD
    + """
MODEL_DIR = 'runs/a'
WIDTH = 8
gin_toy.Run:
  model_dir = %MODEL_DIR
  student = @student/gin_toy.Model()
  teacher = @teacher/gin_toy.Model()
  optimizer = @gin_toy.Adafactor()
student/gin_toy.Model.width = %WIDTH
teacher/gin_toy.Model.width = 32
gin_toy.Model.rate = 0.25
gin_toy.Adafactor.learning_rate = 0.01
"""
)


@pytest.fixture(scope="module", autouse=True)
def toy(tmp_path_factory):
    folder = tmp_path_factory.mktemp("toy")
    (folder / "gin_toy.py").write_text(_TOY)
    sys.path.insert(0, str(folder))
    import gin_toy

    yield gin_toy
    sys.path.remove(str(folder))


@pytest.fixture
def parse(tmp_path, toy):
    def parse_texts(*texts: str, bindings=(), search_paths=()):
        files = []
        for number, text in enumerate(texts):
            (tmp_path / f"f{number}.gin").write_text(text)
            files.append(str(tmp_path / f"f{number}.gin"))
        return configuration.parse(
            roots=(toy.Many, toy.Run),
            gin_files=files,
            bindings=bindings,
            search_paths=search_paths,
        )

    return parse_texts


def test_builds_plain_frozen_dataclasses(parse, toy):
    run = parse(_RUN).build()
    assert run == toy.Run(
        model_dir="runs/a",
        student=toy.Model(width=8, rate=0.25),
        teacher=toy.Model(width=32, rate=0.25),
        optimizer=toy.Adafactor(learning_rate=0.01),
    )
    # gin wraps classes: the objects must be of the original ones all the same.
    assert type(run) is toy.Run
    assert type(run.student) is toy.Model
    assert dataclasses.replace(run, num_steps=3).num_steps == 3
    assert pickle.loads(pickle.dumps(run)) == run
    assert hash(run.student) == hash(toy.Model(width=8, rate=0.25))
    with pytest.raises(dataclasses.FrozenInstanceError):
        run.num_steps = 3


@pytest.mark.parametrize(
    "binding",
    [
        "student/gin_toy.Model.width = 4",
        "WIDTH = 4",
        "student/Model.width = 4",
        "gin_toy.Run.student = @other/gin_toy.Model() \nother/gin_toy.Model.width = 4",
    ],
)
def test_bindings_override_files(parse, binding):
    run = parse(_RUN, bindings=binding.splitlines()).build()
    assert run.student.width == 4
    assert run.teacher.width == 32


def test_later_bindings_and_files_win(parse):
    config = parse(_RUN, "WIDTH = 5", bindings=["WIDTH = 6", "WIDTH = 7"])
    assert config.build().student.width == 7
    assert parse(_RUN, "WIDTH = 5").build().student.width == 5


def test_scopes_follow_gin(parse, toy):
    """Prefixes of a scope apply, a scoped reference replaces the scope, a macro makes one."""
    text = (
        _HEAD
        + """
MODEL = @gin_toy.Model()
MODEL/gin_toy.Model.width = 3
gin_toy.Many.runs = (@a/b/gin_toy.Run(), @a/gin_toy.Run())
gin_toy.Run.model_dir = 'x'
gin_toy.Run.student = @gin_toy.Model()
a/b/gin_toy.Run.teacher = %MODEL
a/gin_toy.Model.width = 1
a/b/gin_toy.Model.width = 2
gin_toy.Model.rate = 0.5
a/gin_toy.Run.lengths = {'inputs': @gin_toy.double(), 'all': [1, -2.5, None]}
a/gin_toy.double.value = 4
"""
    )
    config = parse(text)
    inner, outer = config.build().runs
    assert inner.student == toy.Model(width=2, rate=0.5)
    assert inner.teacher == toy.Model(width=3, rate=0.5)
    assert outer.student == toy.Model(width=1, rate=0.5)
    assert outer.teacher is None
    assert inner.lengths == {"inputs": 8, "all": [1, -2.5, None]}
    settings = _settings(config)
    assert settings["runs[0].teacher"] == "@gin_toy.Model()"
    assert settings["runs[0].teacher.width"] == "3"
    assert settings["runs[0].lengths['inputs'].value"] == "4"
    again = configuration.parse_text(config.text, roots=(toy.Many,), name="again")
    assert again.build() == config.build()
    assert again.text == config.text


def test_a_binding_outside_the_scopes_in_use_is_refused(parse):
    text = _RUN + "b/student/gin_toy.Model.dtype = 'float32'\n"
    with pytest.raises(GinError) as error:
        parse(text)
    assert "b/student/gin_toy.Model.dtype is not used" in str(error.value)
    assert "Did you mean 'student/gin_toy.Model.dtype'?" in str(error.value)


_WITH_ROOMS = _RUN.replace(
    _HEAD,
    _HEAD
    + "from gkd_jax import objectives\nfrom gkd_jax.data.metrics import text_metrics as scores\n"
    + "from gkd_jax.objectives import divergences\n",
)

_REFUSED = {
    "misspelt module": (
        "from __gin__ import dynamic_registration\nfrom gkd_jax.models import bsae\n",
        ["f0.gin:2", "'gkd_jax.models.bsae'", "Did you mean 'gkd_jax.models.base'?"],
    ),
    "misspelt room": (
        "from __gin__ import dynamic_registration\nfrom gkd_jax.distilation import teachers\n",
        ["f0.gin:2", "Did you mean 'gkd_jax.distillation.teachers'?"],
    ),
    "module of another room": (
        "from __gin__ import dynamic_registration\nfrom gkd_jax.objectives import teachers\n",
        ["f0.gin:2", "Did you mean 'gkd_jax.distillation.teachers'?"],
    ),
    "misspelt class of a room": (
        _WITH_ROOMS + "gin_toy.Run.optimizer = @objectives.ForwardKl()\n",
        ["f0.gin:19", "gkd_jax.objectives has no 'ForwardKl'. Did you mean 'ForwardKL'?"],
    ),
    "misspelt parameter of a class that a room re-exports": (
        _WITH_ROOMS + "objectives.GeneralizedJSD.betta = 0.1\n",
        ["objectives.GeneralizedJSD has no parameter 'betta'. Did you mean 'beta'?"],
    ),
    "class called by the module that defines it": (
        _WITH_ROOMS + "divergences.ForwardKL.bound = 0.1\n",
        ["f0.gin:19", "divergences.ForwardKL has no parameter 'bound'. It has none."],
    ),
    "function called by another name of its module": (
        _WITH_ROOMS + "scores.bleu.seed = 1\n",
        ["f0.gin:19: scores.bleu.seed is not used: no value in use refers to @scores.bleu()"],
    ),
    "misspelt room in a value": (
        _WITH_ROOMS + "gin_toy.Run.optimizer = @objectivs.ForwardKL()\n",
        ["'objectivs' (in 'objectivs.ForwardKL') is not imported", "'objectives'?"],
    ),
    "module that is not imported": (
        _WITH_ROOMS + "gin_toy.Run.optimizer = @teachers.LiveStudent()\n",
        ["is not imported in this file. Import it: `from gkd_jax.distillation import teachers`."],
    ),
    "misspelt import name": (
        _RUN + "gin_toi.Model.rate = 0.0\n",
        ["f0.gin:16", "'gin_toi' (in 'gin_toi.Model') is not imported", "'gin_toy'?"],
    ),
    "misspelt class": (
        _RUN + "gin_toy.Modle.rate = 0.0\n",
        ["f0.gin:16", "gin_toy has no 'Modle'. Did you mean 'Model'?"],
    ),
    "misspelt class in a value": (
        _RUN + "gin_toy.Run.optimizer = @gin_toy.Adamm()\n",
        ["f0.gin:16", "gin_toy has no 'Adamm'. Did you mean 'Adam'?"],
    ),
    "misspelt class of a block": (
        _RUN + "gin_toy.Adm:\n  learning_rate = 0.1\n",
        ["f0.gin:16", "gin_toy has no 'Adm'. Did you mean 'Adam'?"],
    ),
    "misspelt parameter": (
        _RUN + "gin_toy.Adafactor.learning_rte = 0.0\n",
        ["f0.gin:16", "has no parameter 'learning_rte'. Did you mean 'learning_rate'?"],
    ),
    "misspelt parameter in a block": (
        _RUN + "gin_toy.Adafactor:\n  decay = 1\n  dekay = 1\n",
        ["f0.gin:18", "has no parameter 'dekay'. Did you mean 'decay'?"],
    ),
    "misspelt macro in a value": (
        _RUN + "gin_toy.Run.num_steps = %WIDHT\n",
        ["f0.gin:16", "%WIDHT is used by gin_toy.Run.num_steps and has no value", "'WIDTH'?"],
    ),
    "unused macro": (
        _RUN + "MODELDIR = 'b'\n",
        ["f0.gin:16", "the macro MODELDIR is not used", "Did you mean 'MODEL_DIR'?"],
    ),
    "unused class": (
        _RUN + "gin_toy.Adam.learning_rate = 1.0\n",
        ["f0.gin:16", "gin_toy.Adam.learning_rate is not used", "@gin_toy.Adam()"],
    ),
    "unused scope": (
        _RUN + "studnt/gin_toy.Model.dtype = 'float32'\n",
        ["f0.gin:16", "studnt/gin_toy.Model.dtype is not used", "'student/gin_toy.Model.dtype'?"],
    ),
    "class without parentheses": (
        _RUN + "gin_toy.Run.optimizer = @gin_toy.Adam\n",
        ["f0.gin:16", "Write @gin_toy.Adam() with parentheses"],
    ),
    "text without quotes": (
        _RUN + "gin_toy.Run.model_dir = runs\n",
        ["f0.gin:16", "Text needs quotes", "In the line: gin_toy.Run.model_dir = runs"],
    ),
    "unclosed bracket": (_RUN + "gin_toy.Run.extras = (1,\n", ["f0.gin"]),
    "built from itself": (
        _RUN + "gin_toy.Run.extras = %A\nA = %B\nB = [1, %A]\n",
        ["A is built from itself"],
    ),
    "no dynamic registration": (
        "import gin_toy\n",
        ["f0.gin:1", "from __gin__ import dynamic_registration"],
    ),
    "no root": ("FOO = 1\n", ["no gin file binds gin_toy.Many or gin_toy.Run"]),
    "a module where a class is wanted": (_RUN + "gin_toy.width = 1\n", ["f0.gin:16", "no dot"]),
    "a method": (_RUN + "gin_toy.Model.replace.width = 1\n", ["f0.gin:16", "class or function"]),
    "missing include": (_RUN + "include 'nowhere.gin'\n", ["f0.gin:16", "no gin file 'nowhere"]),
    "includes itself": (_RUN + "include 'f0.gin'\n", ["f0.gin:16", "includes itself"]),
}


@pytest.mark.parametrize("case", _REFUSED)
def test_is_refused(parse, case):
    text, wanted = _REFUSED[case]
    with pytest.raises(GinError) as error:
        parse(text)
    for part in wanted:
        assert part in str(error.value)
    assert "things are wrong" not in str(error.value), "one fault must give one message"


_REFUSED_FLAGS = {
    "unknown macro": ("FOO = 1", ["the macro FOO is not used"]),
    "misspelt macro": ("MODEL_DIRR = 'x'", ["Did you mean 'MODEL_DIR'?"]),
    "misspelt class": ("gin_toy.Rum.num_steps = 1", ["Did you mean 'Run'?"]),
    "misspelt class alone": ("Rum.num_steps = 1", ["no gin file uses", "Did you mean 'Run'?"]),
    "misspelt parameter": ("Run.num_step = 1", ["Did you mean 'num_steps'?"]),
    "no quotes": ("MODEL_DIR = runs/b", ["--gin.MODEL_DIR='\"runs/b\"'"]),
    "no quotes, absolute": ("MODEL_DIR = /runs/b", ["--gin.MODEL_DIR='\"/runs/b\"'"]),
    "no value": ("MODEL_DIR", ["no gin value"]),
}


@pytest.mark.parametrize("case", _REFUSED_FLAGS)
def test_flag_is_refused(parse, case):
    binding, wanted = _REFUSED_FLAGS[case]
    with pytest.raises(GinError) as error:
        parse(_RUN, bindings=[binding])
    for part in ["command line", *wanted]:
        assert part in str(error.value)


def test_every_wrong_name_is_reported_at_once(parse):
    text = _RUN + (
        "gin_toy.Run.extras = (\n    @gin_toy.Adm(),\n    @gin_toy.Adam(),\n)\n"
        "gin_toy.Run.optimizer = @gin_toy.Adafactr()\n"
        "gin_toy.Model.wdth = 3\n"
    )
    with pytest.raises(GinError) as error:
        parse(text)
    message = str(error.value)
    assert "'Adm'" in message
    assert "'wdth'" in message
    assert "'Adafactr'" in message
    assert "3 things are wrong" in message


def test_missing_values_are_listed_at_once(parse):
    text = (
        _HEAD
        + """
MODEL_DIR = %gin.REQUIRED
SIZE = %gin.REQUIRED
gin_toy.Run.model_dir = %MODEL_DIR
gin_toy.Run.student = @student/gin_toy.Model()
gin_toy.Run.lengths = {'inputs': %SIZE}
gin_toy.Run.num_steps = %gin.REQUIRED
"""
    )
    with pytest.raises(MissingValues) as error:
        parse(text)
    names = ("MODEL_DIR", "SIZE", "gin_toy.Run.num_steps", "student/gin_toy.Model.width")
    assert sorted(error.value.names) == sorted(names)
    for name in names:
        assert f"--gin.{name}=" in str(error.value)
    bindings = ["MODEL_DIR = 'x'", *(f"{name} = 3" for name in names[1:])]
    run = parse(text, bindings=bindings).build()
    assert (run.model_dir, run.lengths, run.num_steps, run.student.width) == (
        "x",
        {"inputs": 3},
        3,
        3,
    )


def test_a_missing_value_of_a_macros_object_is_named_without_the_macro(parse):
    text = (
        _HEAD
        + """
gin_toy.Run.model_dir = 'x'
gin_toy.Run.student = %STUDENT
STUDENT = @gin_toy.Model()
"""
    )
    with pytest.raises(MissingValues) as error:
        parse(text)
    assert error.value.names == ("gin_toy.Model.width",)
    assert parse(text, bindings=["gin_toy.Model.width = 3"]).build().student.width == 3


@pytest.mark.parametrize(("given", "hint"), [("sfd", "Did you mean '{}'?"), ("entropy", "")])
def test_a_gin_file_is_suggested_by_its_own_name(given, hint, tmp_path):
    """Whatever its folder has in common."""
    (tmp_path / "sft.gin").touch()
    with pytest.raises(FileNotFoundError) as error:
        configuration.parse(roots=(), gin_files=[str(tmp_path / f"{given}.gin")])
    suggested = str(error.value).partition("Searched")[0].partition("gin'.")[2].strip()
    assert suggested == hint.format(tmp_path / "sft.gin")


def test_what_an_override_leaves_unused_is_no_error(parse, toy):
    """But what is bound after the override, and not used, is."""
    config = parse(_RUN, bindings=["Run.optimizer = @gin_toy.Adam()", "Run.teacher = None"])
    assert config.build().optimizer == toy.Adam()
    assert "Adafactor" not in config.text
    assert "teacher/" not in config.text
    with pytest.raises(GinError, match=r"Adafactor\.decay is not used"):
        parse(_RUN, bindings=["Run.optimizer = @gin_toy.Adam()", "Adafactor.decay = 0.5"])


def test_an_override_file_may_bind_inner_scopes(parse):
    text = "from __gin__ import dynamic_registration\nimport gin_toy\n" + (
        "student/gin_toy.Model.rate = 0.5\nteacher/gin_toy.Model.rate = 0.75\n"
    )
    run = parse(_RUN, text).build()
    assert (run.student.rate, run.teacher.rate) == (0.5, 0.75)


def test_missing_file_lists_where_it_was_searched(tmp_path, toy):
    (tmp_path / "recipe.gin").write_text(_RUN)
    with pytest.raises(FileNotFoundError) as error:
        configuration.parse(
            roots=(toy.Run,), gin_files=["recipy.gin"], search_paths=[str(tmp_path)]
        )
    message = str(error.value)
    assert str(tmp_path / "recipy.gin") in message
    assert str(pathlib.Path.cwd() / "recipy.gin") in message
    assert "Did you mean 'recipe.gin'?" in message


def test_includes_are_found_beside_the_file_and_on_search_paths(tmp_path, toy, monkeypatch):
    (tmp_path / "deep").mkdir()
    (tmp_path / "deep" / "base.gin").write_text(_RUN)
    (tmp_path / "deep" / "near.gin").write_text("include 'base.gin'\nWIDTH = 9\n")
    (tmp_path / "far.gin").write_text("include 'deep/near.gin'\n")
    monkeypatch.chdir("/")
    config = configuration.parse(
        roots=(toy.Run,), gin_files=["far.gin"], search_paths=[str(tmp_path)]
    )
    assert config.build().student.width == 9


def test_error_of_a_value_is_one_message(parse):
    config = parse(_RUN, bindings=["student/gin_toy.Model.rate = 1.5"])
    with pytest.raises(ValueError, match=r"Model\.rate must be in") as error:
        config.build()
    assert str(error.value) == (
        "Model.rate must be in [0, 1); got 1.5. Set it to 0.1. (in student/Model)"
    )


def test_saved_text_has_defaults_and_gives_the_same_run(parse, toy):
    config = parse(_RUN, bindings=["Run.optimizer = @gin_toy.Adam()", "Adam.learning_rate = 2.0"])
    assert "gin_toy.Model.dtype = 'bfloat16'" in config.text
    assert "gin_toy.Run.num_steps = 10" in config.text
    assert "MODEL_DIR = 'runs/a'" in config.text
    # A default that is itself an object is written out, apart from others of its class.
    assert "gin_toy.Run.fallback = @Run_fallback/gin_toy.Adam()" in config.text
    assert "Run_fallback/gin_toy.Adam.learning_rate = 0.5" in config.text
    assert config.build().fallback == toy.Adam(0.5)
    assert config.build().optimizer == toy.Adam(2.0)
    again = configuration.parse_text(config.text, roots=(toy.Many, toy.Run), name="config.gin")
    assert again.text == config.text
    assert again.settings == config.settings
    assert again.build() == config.build()


def _settings(config):
    return {setting.path: setting.value for setting in config.settings}


def test_settings_do_not_depend_on_scopes_and_macros(parse):
    config = parse(_RUN)
    settings = _settings(config)
    assert settings["model_dir"] == "'runs/a'"
    assert settings["student"] == "@gin_toy.Model()"
    assert settings["student.width"] == "8"
    assert settings["teacher.rate"] == "0.25"
    assert settings["fallback.learning_rate"] == "0.5"
    direct = _RUN.replace("WIDTH = 8\n", "").replace("%WIDTH", "8").replace("student/", "pupil/")
    direct += "gin_toy.Run.fallback = @gin_toy.Adam()\ngin_toy.Adam.learning_rate = 0.5\n"
    assert parse(direct).settings == config.settings


def test_a_binding_that_inner_scopes_override_is_refused(parse):
    with pytest.raises(GinError, match=r"gin_toy\.Model\.width has no effect") as error:
        parse(_RUN, bindings=["Model.width = 3"])
    assert "student/gin_toy.Model.width, teacher/gin_toy.Model.width" in str(error.value)


def test_changed_configuration_is_refused_with_the_difference(parse, tmp_path):
    model_dir = str(tmp_path / "run")
    config = parse(_RUN)
    configuration.check_config(model_dir, config)
    configuration.save_config(model_dir, config, command="first")
    configuration.check_config(model_dir, config)

    changed = parse(_RUN, bindings=["WIDTH = 9", "Run.num_steps = 20", "MODEL_DIR = 'elsewhere'"])
    may_change = ("Run.model_dir", "Run.num_steps")
    with pytest.raises(GinError) as error:
        configuration.check_config(model_dir, changed, may_change=may_change)
    lines = str(error.value).splitlines()
    assert lines[3:5] == ["  -student.width = 8", "  +student.width = 9"]
    assert not any("num_steps" in line or "model_dir" in line for line in lines)
    assert "--allow_changed_config" in lines[-1]

    longer = parse(_RUN, bindings=["Run.num_steps = 20", "MODEL_DIR = 'elsewhere'"])
    configuration.check_config(model_dir, longer, may_change=may_change)


def test_save_keeps_the_old_configuration(parse, tmp_path, toy):
    model_dir = tmp_path / "run"
    first, second = parse(_RUN), parse(_RUN, bindings=["WIDTH = 9"])
    configuration.save_config(str(model_dir), first, command="python -m first")
    configuration.save_config(str(model_dir), first, command="python -m again")
    assert [path.name for path in model_dir.iterdir()] == ["config.gin"]
    assert "# python -m first" in (model_dir / "config.gin").read_text()
    configuration.save_config(str(model_dir), second, command="python -m second")
    assert sorted(path.name for path in model_dir.iterdir()) == ["config.1.gin", "config.gin"]
    rebuilt = [
        configuration.parse(roots=(toy.Run,), gin_files=[str(model_dir / name)]).build()
        for name in ("config.1.gin", "config.gin")
    ]
    assert [run.student.width for run in rebuilt] == [8, 9]


def test_folder_that_cannot_be_written(parse, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="model_dir must be a folder that can be written"):
        configuration.save_config(str(tmp_path / "file" / "run"), parse(_RUN), command="")


def test_a_saved_file_that_is_broken_is_refused(parse, tmp_path):
    (tmp_path / "config.gin").write_text("from __gin__ import dynamic_registration\nimport gine\n")
    with pytest.raises(GinError, match="cannot be read any more"):
        configuration.check_config(str(tmp_path), parse(_RUN))


def test_large_configurations_are_read_quickly(parse):
    runs = [f"@r{n}/gin_toy.Run()" for n in range(40)]
    lines = [f"gin_toy.Many.runs = ({', '.join(runs)})", "gin_toy.Run.model_dir = 'x'"]
    for n in range(40):
        lines += [
            f"r{n}/gin_toy.Run.student = @gin_toy.Model()",
            f"r{n}/gin_toy.Model.width = {n}",
            f"r{n}/gin_toy.Model.rate = 0.5",
        ]
    start = time.monotonic()
    config = parse(_HEAD + "\n".join(lines))
    assert time.monotonic() - start < 2.0
    assert [run.student.width for run in config.build().runs] == list(range(40))
