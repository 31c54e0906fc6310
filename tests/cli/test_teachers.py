"""Recipes that learn from earlier runs: trained first, each once, and checked before anything is written."""

import json
import os
from pathlib import Path

import pytest
import torch
import yaml

from lightning_robust.cli import earlier
from lightning_robust.cli.errors import CommandError

IMAGES = {"class_path": "ImageClassifier", "init_args": {"backbone": "resnet8_cifar", "backbone_options": {"width": 4}}}
TRAINER = {"max_epochs": 1, "accelerator": "cpu", "limit_train_batches": 4, "log_every_n_steps": 2}
TRAINER |= {"enable_model_summary": False, "enable_progress_bar": False}
ATTACK = {"class_path": "PGD", "init_args": {"eps": 0.1, "steps": 1}}


def learning(clean="{clean}", robust="{robust}"):
    options = {"clean_teacher": clean, "robust_teacher": robust, "attack": ATTACK}
    objective = {"class_path": "MTARD", "init_args": options}
    return {"objective": {"class_path": "ObjectiveTraining", "init_args": {"objective": objective}}}


@pytest.fixture
def student(tiny):
    """Writes a student, its clean teacher plain.yaml and its robust teacher attacked.yaml."""
    parts = {"model": IMAGES, "trainer": TRAINER}
    tiny("plain", **parts)
    attack = {"class_path": "AdversarialTraining", "init_args": {"attack": ATTACK}}
    tiny("attacked", methods={"attack": attack}, **parts)
    teachers = {"clean": "./plain.yaml", "robust": "./attacked.yaml"}

    def write(name="student", **more):
        return tiny(name, **{"teachers": teachers, "methods": learning(), **parts, **more})

    return write


def summary(folder):
    return json.loads(Path(folder, "summary.json").read_text())


def test_teachers_are_trained_first_each_once(lr, student):
    recipe = student(baseline="./plain.yaml")
    answer = lr("run", recipe)
    assert answer.code == 0, answer.err
    order = ["Training the baseline plain in", "Training the teacher robust, attacked in", "Training student"]
    assert sorted(order, key=answer.out.index) == order
    assert sorted(os.listdir("runs")) == ["attacked", "plain", "student"]
    assert os.listdir("runs/plain") == ["1"]  # baseline and clean teacher are the same training
    found = summary("runs/student/1")
    assert found["baseline"] == found["teachers"]["clean"] == str(Path("runs/plain/1").resolve())
    assert found["teachers"]["robust"] == str(Path("runs/attacked/1").resolve())
    assert found["compared_with"]["recipe"] == "plain"
    saved = yaml.safe_load(Path("runs/student/1/config.yaml").read_text())
    assert saved["teachers"] == {"clean": "./plain.yaml", "robust": "./attacked.yaml"}
    options = saved["methods"]["objective"]["init_args"]["objective"]["init_args"]
    assert (options["clean_teacher"], options["robust_teacher"]) == ("{clean}", "{robust}")

    again = lr("run", recipe)
    assert "Training the" not in again.out
    assert "Teacher robust, attacked: reusing" in again.out
    assert summary("runs/student/2")["evaluation"] == found["evaluation"]
    answer = lr("run", recipe, "--fresh")
    assert "Training the teacher robust, attacked in" in answer.out
    assert sorted(os.listdir("runs/plain")) == ["1", "2"]


def test_a_student_really_learns_from_the_checkpoints_that_the_words_stand_for(lr, student):
    assert lr("run", student()).code == 0
    manifest = torch.load("runs/student/1/checkpoints/last.ckpt", weights_only=True)["callbacks"]
    text = str(manifest)
    for name in ("plain", "attacked"):
        assert str(Path(f"runs/{name}/1/checkpoints/best.ckpt").resolve()) in text


def test_options_of_data_apply_to_teachers_and_those_of_the_student_do_not(lr, student):
    changes = ("--data.batch_size", "64", "--model.backbone_options", "{width: 2}", "--trainer.max_epochs", "2")
    assert lr("run", student(), *changes).code == 0
    teacher, own = (yaml.safe_load(Path(f"runs/{name}/1/config.yaml").read_text()) for name in ("plain", "student"))
    assert teacher["data"]["init_args"]["batch_size"] == own["data"]["init_args"]["batch_size"] == 64
    assert teacher["model"]["init_args"]["backbone_options"] == {"width": 4}
    assert (teacher["trainer"]["max_epochs"], own["trainer"]["max_epochs"]) == (1, 2)


def test_a_teacher_may_be_a_run_folder_or_a_file(lr, student):
    lr("run", "plain.yaml", "--out", "old")
    answer = lr(
        "run", student(), "--teachers.clean", "old/plain/1", "--teachers.robust=old/plain/1/checkpoints/last.ckpt"
    )
    assert answer.code == 0, answer.err
    assert os.listdir("runs") == ["student"]
    assert summary("runs/student/1")["teachers"] == {
        "clean": str(Path("old/plain/1/checkpoints/best.ckpt").resolve()),
        "robust": str(Path("old/plain/1/checkpoints/last.ckpt").resolve()),
    }
    assert lr("check", "runs/student/1/config.yaml").code == 0


def test_everything_missing_is_named_before_anything_is_trained(lr, student):
    files = {"clean": "./plain.yaml", "robust": "weights/wrn.pt", "third": "weights/other.ckpt"}
    for command in ("run", "check"):
        answer = lr(command, student(teachers=files))
        assert answer.code == 2
        assert answer.lines == [
            "error: `teachers.robust`: there is no file weights/wrn.pt.",
            "  `teachers.third`: there is no file weights/other.ckpt.",
            "  Name a checkpoint, a run folder or a recipe that trains it, for example --teachers.robust runs/mine/1",
        ]
    Path("empty").mkdir()
    assert "empty is no run folder" in lr("run", student(), "--teachers.clean", "empty").lines[0]
    answer = lr("run", student(methods=learning(robust="weights/wrn.pt")))
    assert answer.code == 2
    assert "weights/wrn.pt" in answer.err
    Path("broken.pt").write_bytes(b"no weights")
    answer = lr("run", student(methods=learning(robust="broken.pt")))
    assert answer.code == 2
    assert "broken.pt" in answer.err
    assert not Path("runs").exists()


WRONG = [
    ({"teachers": ["plain.yaml"]}, "`teachers` must map names of your choice to recipes."),
    ({"teachers": {"run": "./plain.yaml"}}, "`run` cannot be the name of a teacher"),
    ({"teachers": {"my-teacher": "./plain.yaml"}}, "`my-teacher` cannot be the name of a teacher"),
    ({"teachers": {"clean": 3}}, "`teachers.clean` must be the name of a recipe but is 3."),
    ({"teachers": {"clean": "nowhere"}}, "There is no recipe and no file called 'nowhere'."),
    ({"teachers": {"clean": "digits-mtard"}}, "digits-mtard learns from an earlier run itself"),
    ({"teachers": {"clean": "digits-distill"}}, "digits-distill learns from an earlier run itself"),
    ({"teachers": {"clean": "digits-label-noise"}}, "digits-label-noise compares several trainings"),
    ({"methods": learning(robust="{robst}")}, "`student` uses {robst}, which stands for nothing."),
]


@pytest.mark.parametrize(("parts", "text"), WRONG, ids=[text.split()[0] + str(n) for n, (_, text) in enumerate(WRONG)])
def test_wrong_teachers_are_refused(lr, student, parts, text):
    used = {"methods": {}} if "teachers" in parts else {}
    for command in ("run", "check"):
        answer = lr(command, student(**{**used, **parts}))
        assert answer.code == 2
        assert text in answer.lines[0]
    assert not Path("runs").exists()


def test_hints_and_options(lr, student):
    answer = lr("run", student(methods=learning(robust="{robst}")))
    assert answer.lines[1:] == ["  Did you mean `{robust}`?", "  Name a teacher with: --teachers.robst RECIPE"]
    assert "one teacher at a time" in lr("run", student(), "--teachers", "plain.yaml").lines[0]
    assert lr("run", student(), "--teachers.clean").lines == ["error: --teachers.clean needs a value."]


def test_check_stands_in_for_teachers(lr, student, own_folder):
    recipe = student()
    before = sorted(os.listdir(own_folder))
    answer = lr("check", recipe)
    assert answer.code == 0, answer.err
    assert "clean: ./plain.yaml, robust: ./attacked.yaml" in answer.out
    assert sorted(os.listdir(own_folder)) == before


def test_a_run_that_was_stopped_while_its_teachers_trained_goes_on(lr, student, monkeypatch):
    real, calls = earlier.train, []

    def stopped(*arguments, **options):
        calls.append(arguments)
        if len(calls) == 2:
            raise CommandError("Training was stopped.")
        real(*arguments, **options)

    monkeypatch.setattr(earlier, "train", stopped)
    assert lr("run", student()).code == 1
    assert calls[1][1].parent.name == "attacked"
    assert [summary(f"runs/{name}/1")["status"] for name in ("plain", "attacked", "student")] == [
        "complete", "waiting", "waiting"
    ]  # fmt: skip
    answer = lr("run", "--resume", "runs/student/1")
    assert answer.code == 0, answer.err
    assert "the teacher clean" not in answer.out
    assert "Training the teacher robust, attacked in" in answer.out
    assert {summary(f"runs/{name}/1")["status"] for name in ("plain", "attacked", "student")} == {"complete"}


def test_a_teacher_that_was_trained_but_not_measured_is_not_trained_again(lr, student, monkeypatch):
    def broken(*arguments):
        raise CommandError("cannot be evaluated")

    with monkeypatch.context() as patch:
        patch.setattr(earlier, "measure", broken)
        assert lr("run", student()).code == 1
    before = Path("runs/plain/1/checkpoints/last.ckpt").stat().st_mtime_ns
    answer = lr("run", "--resume", "runs/student/1")
    assert answer.code == 0, answer.err
    assert Path("runs/plain/1/checkpoints/last.ckpt").stat().st_mtime_ns == before


def test_a_message_says_to_continue_the_run_and_not_its_teacher(lr, student, tiny):
    crash = {"crash": {"class_path": "support.tiny.CrashAt", "init_args": {"step": 2}}}
    tiny("plain", model=IMAGES, trainer=TRAINER, methods=crash)
    answer = lr("run", student(teachers={"clean": "./plain.yaml", "robust": "./plain.yaml"}))
    assert answer.code == 1
    assert (
        answer.lines[-1].strip() == f"Continue with: lightning-robust run --resume {Path('runs/student/1').resolve()}"
    )


def test_the_arms_of_a_comparison_share_their_teachers(lr, student):
    arms = {"plain": {}, "taught": {"methods": learning()}}
    compare = {"seeds": [0, 1], "quantities": ["accuracy", "adv_accuracy"], "arms": arms}
    recipe = student(methods={}, compare=compare)
    assert lr("check", recipe).code == 0
    answer = lr("run", recipe)
    assert answer.code == 0, answer.err
    assert answer.out.count("Training the teacher") == 2
    assert os.listdir("runs/plain") == os.listdir("runs/attacked") == ["1"]
    found = summary("runs/student/1")
    assert found["teachers"]["robust"] == str(Path("runs/attacked/1").resolve())
    values = found["comparison"]["values"]["taught"]["0"]
    assert 0 <= values["adv_accuracy"] <= values["accuracy"]

    answer = lr("run", "--resume", "runs/student/1", "--compare.seeds", "0,1,2", "--compare.quantities", "accuracy")
    assert answer.code == 0, answer.err
    assert "Training the teacher" not in answer.out
    assert (
        lr("run", recipe, "--compare.arms.taught.teachers.clean", "plain.yaml")
        .lines[0]
        .endswith("`teachers.clean` is common to all arms.")
    )


def test_attacked_quantities_need_an_attack(lr, student):
    compare = {"seeds": [0], "quantities": ["autoattack"], "arms": {"a": {}}}
    answer = lr("run", student(teachers=None, methods={}, compare=compare, evaluation={}))
    assert answer.lines == ["error: In the arm `a`: `autoattack` needs an attack; name one in `evaluation.attack`."]


def test_autoattack_is_measured_with_the_budget_of_the_recipe(lr, student, monkeypatch):
    from lightning_robust.cli import measured

    real, asked = measured.AutoAttack, []

    def weak(**options):
        asked.append(options)
        return real(steps=1, queries=1, **options)

    monkeypatch.setattr(measured, "AutoAttack", weak)
    compare = {"seeds": [0], "quantities": ["accuracy", "autoattack"], "arms": {"a": {}}}
    evaluation = {"attack": ATTACK, "max_attacked": 5}
    answer = lr("run", student(teachers=None, methods={}, compare=compare, evaluation=evaluation))
    assert answer.code == 0, answer.err
    assert asked == [{"eps": 0.1, "norm": "linf", "mean": None, "std": None, "bounds": (0.0, 1.0)}]
    assert summary("runs/student/1")["comparison"]["values"]["a"]["0"]["autoattack"] in {0, 0.2, 0.4, 0.6, 0.8, 1}
