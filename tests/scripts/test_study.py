from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from sbp.training.benchmark.report import write_record
from sbp.training.models.build import build_model
from sbp.training.runtime import seeding
from scripts import study, study_tasks
from scripts.reproduction.arms import ARMS, sbp_arguments
from scripts.reproduction.claims import ANSWERED, arms_of, gradients_of
from scripts.reproduction.settings import SCALES, Setting
from scripts.study_tasks import Experiment, arm_config, by_seed, link_images, shell, tasks
from tests.conftest import others_slow

SETTINGS = {one.name: (scale, one) for scale, of_it in SCALES.items() for one in of_it.settings}


def experiment_of(name, tmp_path):
    scale, setting = SETTINGS[name]
    return Experiment.of(scale, setting, torch.device("cpu"), str(tmp_path), str(tmp_path), str(tmp_path), None)


def known(setting: Setting) -> list[str]:
    return arms_of(list(ANSWERED.values()), setting)


@pytest.mark.parametrize("name", others_slow(SETTINGS, [], ["digits-vit", "small-convnext"]))
def test_every_arm_is_a_run_that_train_py_takes(name, tmp_path):
    """Each differs from the others, and has as many SBP layers as the setting says."""
    experiment = experiment_of(name, tmp_path)
    configs = {arm: arm_config(experiment, arm) for arm in known(experiment.setting)}
    assert len({str(config) for config in configs.values()}) == len(configs)
    if experiment.setting.gradients_only or experiment.setting.plain_only:
        assert list(configs) == ["plain"]
        return
    with torch.device("meta"):
        for arm in {"sbp", "layers_other"} & set(configs):
            config = configs[arm]
            sizes = config.data.num_classes, config.data.image_size
            model = build_model(config.backbone, config.sbp, *sizes)
            states = {module.sbp_state for module in model.modules() if hasattr(module, "sbp_state")}
            assert [len(state.layers) for state in states] == [experiment.setting.sbp_layers]
    if experiment.setting.starts_from is not None:
        return
    rising = configs["rising"].sbp.keep_ratio
    assert len(rising) == experiment.setting.sbp_layers and sum(rising) / len(rising) == pytest.approx(0.5, abs=1e-3)


@pytest.mark.long
def test_runs_of_one_seed_start_alike(tmp_path):
    """With the same weights, and with the same images in the same order."""
    experiment = experiment_of("digits-vit", tmp_path)
    configs = {arm: arm_config(experiment, arm) for arm in known(experiment.setting)}
    models = {}
    for arm, config in configs.items():
        seeding.seed_everything(config.seed, seeding.WEIGHTS)
        data = config.data
        models[arm] = build_model(config.backbone, config.sbp, 10, data.image_size, data.train_image_size).state_dict()
        order = (config.seed, config.global_batch_size, data.source, data.train_images, config.recipe.augment)
        assert order == (0, 64, "cluttered_digits", 3072, False)
    for arm, weights in models.items():
        assert all(torch.equal(value, models["plain"][name]) for name, value in weights.items()), arm


def test_gradients_are_made_by_arguments_of_apply():
    setting = SETTINGS["digits-vit"][1]
    arms = [arm for arm in gradients_of(list(ANSWERED.values()), setting) if arm in ARMS]
    assert sbp_arguments("random", setting) == {"mask": "random"}
    assert sbp_arguments("falling", setting) == {"keep_ratio": [0.75, 0.583, 0.417, 0.25]}
    assert all(isinstance(sbp_arguments(arm, setting), dict) for arm in arms)


def test_seed_by_seed_a_study_can_end_at_any_time(tmp_path):
    """The arms of the first claim in their order, in all settings; a seed is whole before the next one begins."""
    experiments = [replace(experiment_of(name, tmp_path), seeds=[1, 2]) for name in ("small-vit", "small-convnext")]
    claims = [ANSWERED["choice"], ANSWERED["2"]]
    names = list(by_seed(experiments, claims))
    assert names[:4] == [f"{net}, {arm}, seed 1" for arm in ("plain", "sbp") for net in ("small-vit", "small-convnext")]
    assert [name.partition(", ")[2] for name in names[-4:]] == [f"random, seed {seed}" for seed in (1, 1, 2, 2)]
    of_choice = [name.rpartition(" ")[2] for name in names[:-4]]
    assert of_choice == sorted(of_choice) and len(set(names)) == len(names)
    order = [name.split(", ")[1] for name in names if name.startswith("small-vit") and name.endswith("seed 1")]
    assert order == [*arms_of(claims[:1], experiments[0].setting)[: len(order) - 1], "random"]

    with ThreadPoolExecutor(4) as pool:  # as the tasks ask for them
        list(pool.map(lambda experiment: arm_config(experiment, "plain"), 4 * experiments))
    record = {"runs": [{"seed": 1, "val_loss": 1.0}]}
    write_record(record, experiments[0].file("training", "query"))
    assert set(names) - set(by_seed(experiments, claims)) == {"small-vit, query, seed 1"}


def test_fine_tuning_starts_from_the_plain_run_of_the_same_seed_on_other_classes(tmp_path):
    root = tmp_path / "root"
    for split, images in (("train", 3), ("test", 2)):
        for name in "abcdefghij":
            (root / split / name).mkdir(parents=True)
            for number in range(images):
                (root / split / name / f"{number}.png").touch()
    claims = [ANSWERED["fine_tuning"], ANSWERED["masks"]]
    before, after = (experiment_of(name, tmp_path / "runs") for name in ("convnext-before", "convnext-fine_tuned"))
    after = replace(after, setting=replace(after.setting, images_of_each=1))
    for one in (before, after, after):
        link_images(one, root)
    found = {
        (one.setting.name, split): sorted(str(path.relative_to(one.runs / "images" / split)) for path in files)
        for one in (before, after)
        for split in ("train", "test")
        if (files := list((one.runs / "images" / split).glob("*/*.png")))
    }
    assert found["convnext-before", "train"] == [f"{name}/{number}.png" for name in "abcdef" for number in range(3)]
    assert found["convnext-fine_tuned", "train"] == [f"{name}/0.png" for name in "ghij"]
    assert found["convnext-fine_tuned", "test"] == [f"{name}/{number}.png" for name in "ghij" for number in range(2)]

    link = after.runs / "images" / "train" / "g" / "0.png"
    assert link.readlink() == root / "train/g/0.png"
    link_images(after, root.rename(tmp_path / "moved"))
    assert link.readlink() == tmp_path / "moved/train/g/0.png"

    assert arms_of(claims, before.setting) == ["plain"]
    everything = list(ANSWERED.values())
    assert gradients_of(everything, before.setting) == gradients_of(everything, after.setting) == []
    arms = arms_of(claims, after.setting)
    assert {"plain", "sbp", "frozen", "input_0.25"} <= set(arms) and "per_sample" not in arms
    assert "frozen" not in arms_of(claims, SETTINGS["small-convnext"][1])
    config = arm_config(replace(after, common=[*after.common, "seed=3"]), "frozen")
    assert config.backbone.pretrained == f"{before.runs}/plain/seed-3/checkpoints/best.pt"
    assert config.backbone.frozen and not config.sbp.enabled and config.data.num_classes == 4
    assert config.data.root == str(after.runs / "images")
    assert str(tmp_path) not in shell("train.py", after.common)


def test_runs_that_others_start_from_are_made_again_where_only_their_record_is_left(tmp_path):
    before = experiment_of("vit-before", tmp_path / "runs")
    write_record({"runs": [{"seed": seed} for seed in before.seeds]}, before.file("training", "plain"))
    claims = [ANSWERED["fine_tuning"]]
    assert not tasks(before, claims)["training"]
    assert list(tasks(replace(before, gives_start=True), claims)["training"]) == ["plain"]


def test_what_a_setting_starts_from_is_trained_as_well(tmp_path):
    asked = study.StudyConfig(scale="fine_tuning", setting="vit-fine_tuned", data_root=str(tmp_path))
    assert [one.name for one in study.chosen(asked, SCALES["fine_tuning"])] == ["vit-before", "vit-fine_tuned"]
    everything = replace(asked, setting=None)
    assert len(study.chosen(everything, SCALES["fine_tuning"])) == len(SCALES["fine_tuning"].settings) == 4


@pytest.mark.parametrize("only", [None, *study.KINDS])
def test_a_part_of_the_study_can_be_done_alone(only, tmp_path, monkeypatch):
    done = []
    monkeypatch.setattr(study, "by_seed", lambda *_: {"training": lambda jobs: done.append("training")})
    kinds = ("training", "gradients", "published")
    monkeypatch.setattr(
        study, "tasks", lambda *_: {kind: {"a": lambda jobs, kind=kind: done.append(kind)} for kind in kinds}
    )
    monkeypatch.setattr(study, "measure_costs", lambda *_: done.append("costs"))
    monkeypatch.setattr(study, "write_results", lambda folder: None)
    given = ["scale=convnext", "setting=digits-convnext", f"run_dir={tmp_path}", f"results={tmp_path}", "jobs=1"]
    monkeypatch.setattr(study.sys, "argv", ["study.py", *given, *([f"only={only}"] if only else [])])
    study.main()
    assert set(done) == ({only} if only else set(study.KINDS))


@pytest.mark.parametrize("done", [True, False])
def test_what_lies_in_a_folder_whose_run_was_refused_is_not_this_commands(tmp_path, monkeypatch, done):
    experiment = replace(experiment_of("small-vit", tmp_path), seeds=[1, 2])
    for seed in experiment.seeds:
        summary = {"seed": seed, "val_loss": 1.0, **dict.fromkeys(study_tasks.RUN_FACTS, "of before"), "versions": {}}
        write_record(summary, experiment.runs / "sbp" / f"seed-{seed}" / "summary.json")
    taken = iter([False, True, False, False])  # the second seed's folder, at first
    asked = []
    monkeypatch.setattr(study_tasks, "is_taken", lambda folder: asked.append(folder.name) or next(taken))
    monkeypatch.setattr(study_tasks.time, "sleep", lambda seconds: None)
    monkeypatch.setattr(study_tasks.time, "time", lambda: float("inf"))
    jobs = SimpleNamespace(stopping=False, run=lambda command, log: done)
    assert bool(study_tasks.train(experiment, "sbp", jobs)) == done == experiment.has("training", "sbp")
    assert asked == 2 * ["seed-1", "seed-2"]


def test_figures_of_another_device_are_not_added_to(tmp_path):
    experiment = experiment_of("small-vit", tmp_path)
    here = study.environment.device_name(torch.device("cpu")).partition(",")[0]
    write_record({"device": f"{here}, 99 threads", "runs": []}, experiment.file("training", "sbp"))
    study.check_device(experiment)
    for path in (experiment.results / "costs.json", experiment.runs / "sbp" / "seed-1" / "summary.json"):
        write_record({"device": "NVIDIA H100 80GB HBM3"}, path)
        with pytest.raises(SystemExit, match=rf"{path.name} is of NVIDIA H100 80GB HBM3, and this is CPU"):
            study.check_device(experiment)
        path.unlink()


def test_arms_of_equal_time_are_not_trained_without_that_time(tmp_path):
    def fails(what, todo):
        jobs.failed.append("of a step (OutOfMemoryError)")

    jobs = SimpleNamespace(stopping=False, failed=[], do=fails)
    with pytest.raises(SystemExit, match="OutOfMemoryError"):
        study.at_measured_time(
            experiment_of("small-vit", tmp_path), [ANSWERED["alternatives"]], SCALES["cifar10"], jobs
        )


def test_more_and_fewer_epochs_are_whole_ones():
    setting = SETTINGS["small-convnext"][1]

    def timed(ratio):
        return setting.timed({"arms": {"plain": {"step_ms": 200.0}, "sbp": {"step_ms": 200.0 * ratio}}})

    assert setting.timed({"arms": {}}) == setting
    assert {"shorter", "longer"} <= set(known(timed(0.6)))
    assert ARMS["shorter"].overrides(timed(0.6)) == ["sbp=none", "recipe.epochs=2"]
    assert not {"shorter", "longer"} & set(known(timed(0.95)))  # which would be plain training, or SBP, once more


def test_a_part_that_there_is_not():
    with pytest.raises(SystemExit, match="only must be one of training, gradients, published, costs, got testing"):
        study.read_config(["only=testing"])
