import sys
from pathlib import Path

import jsonargparse
import pytest
import torch
import yaml

pytest.importorskip("lightning.pytorch.cli")

from lightning.pytorch import LightningModule
from lightning.pytorch.cli import LightningCLI
from lightning.pytorch.utilities.exceptions import MisconfigurationException

import lightning_memopt as lm
from lightning_memopt import cli as cli_module
from lightning_memopt.cli import MemOptCLI
from tests._commands import keep_parsers, run_python

pytestmark = pytest.mark.slow

QUIET = ["--trainer.accelerator=cpu", "--trainer.logger=false", "--trainer.enable_checkpointing=false",
         "--trainer.enable_progress_bar=false", "--trainer.enable_model_summary=false",
         "--trainer.log_every_n_steps=1", "--trainer.limit_train_batches=4", "--trainer.max_epochs=1"]  # fmt: skip


class Tiny(LightningModule):
    """A bit of a LLaMA: names that have roles."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.embed_tokens = torch.nn.Embedding(16, width)
        self.self_attn = torch.nn.ModuleDict({"q_proj": torch.nn.Linear(width, width, bias=False)})
        self.norm = torch.nn.LayerNorm(width)
        self.lm_head = torch.nn.Linear(width, 16, bias=False)

    def _loss(self, batch):
        hidden = self.norm(self.self_attn["q_proj"](self.embed_tokens(batch)))
        return torch.nn.functional.cross_entropy(self.lm_head(hidden).flatten(0, -2), batch.flatten())

    def training_step(self, batch, batch_idx):
        return self._loss(batch)

    def validation_step(self, batch, batch_idx):
        self.log("val_loss", self._loss(batch))

    def train_dataloader(self):
        generator = torch.Generator().manual_seed(0)
        return torch.utils.data.DataLoader(torch.randint(16, (16, 5), generator=generator), batch_size=4)

    val_dataloader = train_dataloader


class WithOptimizer(Tiny):
    def __init__(self, form: str = "dict") -> None:
        super().__init__()
        self.form = form

    def configure_optimizers(self):
        optimizer = lm.AdaPMLean(list(self.parameters()), lr=0.01)
        scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1)
        forms = {
            "optimizer": lambda: optimizer,
            "dict": lambda: {"optimizer": optimizer, "lr_scheduler": scheduler},
            "lists": lambda: ([optimizer], [scheduler]),
        }
        return forms[self.form]()


class Inner(Tiny):
    """Names the parameters of an inner module, without its prefix."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = torch.nn.Module()
        self.inner.lm_head = self.lm_head

    def configure_optimizers(self):
        return lm.AdaPMLean(self.inner.named_parameters(), overrides={"lm_head.weight": {"rank": 3}})


@pytest.fixture(autouse=True)
def _clean(monkeypatch, tmp_path):
    monkeypatch.setattr(sys, "argv", ["test"])
    # seed_everything writes these.
    monkeypatch.setenv("PL_GLOBAL_SEED", "0")
    monkeypatch.setenv("PL_SEED_WORKERS", "0")
    monkeypatch.chdir(tmp_path)
    keep_parsers(monkeypatch, "fit", "validate")
    yield
    jsonargparse.set_parsing_settings(omegaconf_absolute_to_relative_paths=False)


def fit(*args, model=Tiny, command="fit", **kwargs):
    return MemOptCLI(model, args=[command, *QUIET, *args], **kwargs)


def test_a_checkpoint_chooses_neither_classes_nor_arguments(tmp_path):
    """Lightning would build the class that the file names, with the arguments in it."""
    path = tmp_path / "x.ckpt"
    fit("--optimizer=lightning_memopt.AdaPMLean").trainer.save_checkpoint(path)
    chosen = {"_class_path": f"{__name__}.Inner", "_instantiator": "lightning.pytorch.cli.instantiate_module"}
    torch.save({**torch.load(path), "hyper_parameters": chosen}, path)
    asked = ["validate", *QUIET, f"--model={__name__}.Tiny", f"--ckpt_path={path}"]
    assert type(MemOptCLI(args=asked).model) is Tiny


def test_names_and_options_reach_the_optimizer():
    cli = fit("--optimizer=lightning_memopt.AdaPMLean", "--optimizer.lr=0.02", "--optimizer.rank=2")
    (optimizer,) = cli.trainer.optimizers
    assert type(optimizer) is lm.AdaPMLean
    assert optimizer.param_groups[0]["lr"] == 0.02
    blocks = {block.name: block for block in optimizer.snapshot().blocks}
    assert list(blocks) == [name for name, _ in cli.model.named_parameters()]
    assert blocks["self_attn.q_proj.weight"].role == "query"
    assert blocks["lm_head.weight"].role == "head"
    assert blocks["lm_head.weight"].rank == 2
    assert optimizer.snapshot().step == 4


def test_a_config_file_with_overrides_by_pattern():
    Path("x.yaml").write_text(
        yaml.safe_dump(
            {
                "optimizer": {
                    "class_path": "lightning_memopt.MemOpt",
                    "init_args": {
                        "recipe": "adapm_lean",
                        "lr": 0.01,
                        "betas": [0.8, 0.9],
                        "overrides": {
                            "*q_proj*": {"momentum": "dense", "lr_multiplier": 10},
                            "head": {"rank": 3, "weight_decay": 0.5},
                        },
                    },
                }
            }
        )
    )
    (optimizer,) = fit("--config=x.yaml").trainer.optimizers
    blocks = {block.name: block for block in optimizer.snapshot().blocks}
    assert blocks["self_attn.q_proj.weight"].momentum == "dense"
    assert blocks["self_attn.q_proj.weight"].lr_multiplier == 10
    assert (blocks["lm_head.weight"].rank, blocks["lm_head.weight"].weight_decay) == (3, 0.5)
    assert tuple(optimizer.param_groups[0]["betas"]) == (0.8, 0.9)


@pytest.mark.parametrize("number", ["10", "1e1", "1.0e+1"])
def test_rates_on_the_command_line(number):
    overrides = f"--optimizer.overrides={{head: {{lr_multiplier: {number}}}, '*q_proj*': {{weight_decay: 1e-2}}}}"
    args = ["--optimizer=lightning_memopt.AdaPMLean", overrides, "--trainer.limit_train_batches=1"]
    blocks = {block.name: block for block in fit(*args).trainer.optimizers[0].snapshot().blocks}
    assert blocks["lm_head.weight"].lr_multiplier == 10
    assert blocks["self_attn.q_proj.weight"].weight_decay == 0.01


def test_a_whole_override_on_the_command_line():
    Path("x.yaml").write_text("{optimizer: {class_path: AdaPMLean, init_args: {overrides: {head: {rank: 3}}}}}")
    args = ["--config=x.yaml", "--optimizer.overrides.query={lr_multiplier: 1e1}", "--trainer.limit_train_batches=1"]
    blocks = {block.role: block for block in fit(*args).trainer.optimizers[0].snapshot().blocks}
    assert (blocks["head"].rank, blocks["query"].lr_multiplier) == (3, 10)


@pytest.mark.parametrize("name", ["AdaPM", "AdaPMMini", "AdamSN", "AdamSNSM", "AdaGradSNSM", "RMSPropSN", "AdamMini"])
def test_every_class_is_found_by_its_short_name(name):
    (optimizer,) = fit(
        f"--optimizer={name}", "--optimizer.lr=1e-3", "--trainer.limit_train_batches=1"
    ).trainer.optimizers
    assert type(optimizer).__name__ == name


def test_torch_optimizers_are_those_of_lightning():
    args = ["--optimizer=torch.optim.AdamW", "--optimizer.lr=0.01", "--seed_everything=3"]
    ours = fit(*args)
    theirs = LightningCLI(Tiny, args=["fit", *QUIET, *args], save_config_callback=None)
    assert type(ours.trainer.optimizers[0]) is torch.optim.AdamW
    for mine, other in zip(ours.model.parameters(), theirs.model.parameters(), strict=True):
        torch.testing.assert_close(mine, other, rtol=0, atol=0)


LEAN = ["--optimizer=lightning_memopt.AdaPMLean", "--optimizer.lr=0.5", "--trainer.max_epochs=2"]
DECAY = ["--lr_scheduler=torch.optim.lr_scheduler.ExponentialLR", "--lr_scheduler.gamma=0.5"]


@pytest.mark.parametrize(
    ("args", "kwargs", "steps"),
    [
        ([], {}, 8),
        (["--trainer.accumulate_grad_batches=2"], {}, 4),
        (["--scheduler_interval=epoch"], {}, 2),
        ([], {"scheduler_interval": "epoch"}, 2),
    ],
)
def test_a_scheduler_steps_with_the_optimizer_or_with_epochs(args, kwargs, steps):
    cli = fit(*LEAN, *DECAY, *args, **kwargs)
    assert cli.trainer.optimizers[0].param_groups[0]["lr"] == pytest.approx(0.5 * 0.5**steps)


def test_a_plateau_scheduler_is_lightnings():
    cli = fit(*LEAN, "--lr_scheduler=ReduceLROnPlateau", "--lr_scheduler.monitor=val_loss")
    (config,) = cli.trainer.lr_scheduler_configs
    assert (config.interval, config.monitor, config.reduce_on_plateau) == ("epoch", "val_loss", True)


WARMUP = ["--lr_scheduler=lightning_memopt.WarmupSchedule", "--lr_scheduler.warmup_steps=1"]


def test_a_warmup_takes_its_length_from_the_trainer_and_resumes(tmp_path):
    cli = fit(*LEAN, *WARMUP, "--lr_scheduler.final=0")
    (config,) = cli.trainer.lr_scheduler_configs
    assert (config.interval, config.scheduler.total_steps) == ("step", 8)
    assert cli.trainer.optimizers[0].param_groups[0]["lr"] == pytest.approx(0, abs=1e-9)
    cli.trainer.save_checkpoint(tmp_path / "x.ckpt")
    longer = fit(*LEAN, *WARMUP, "--lr_scheduler.final=0", "--trainer.max_epochs=4", f"--ckpt_path={tmp_path}/x.ckpt")
    (config,) = longer.trainer.lr_scheduler_configs
    assert (config.scheduler.last_epoch, config.scheduler.total_steps) == (16, 16)


def test_a_warmup_as_long_as_the_training_is_a_warning():
    with pytest.warns(UserWarning, match=r"warm-up of 8 steps is as long as the whole training of 8, so the rate"):
        fit(*LEAN, "--lr_scheduler=lightning_memopt.WarmupSchedule", "--lr_scheduler.warmup_steps=8")


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--trainer.max_epochs=-1"], "Training has no end, or an epoch no known length, so the cosine decay of"),
        (["--scheduler_interval=epoch"], "WarmupSchedule counts optimizer steps: leave out --scheduler_interval=epoch"),
    ],
)
def test_a_warmup_without_a_length(args, message):
    with pytest.raises(MisconfigurationException, match=message):
        fit(*LEAN, *WARMUP, *args)


class Stream(torch.utils.data.IterableDataset):
    def __iter__(self):
        return iter(torch.randint(16, (4, 2, 5)))


class Streamed(Tiny):
    def train_dataloader(self):
        return torch.utils.data.DataLoader(Stream(), batch_size=None)


def test_a_warmup_over_data_without_a_length():
    args = [*LEAN, *WARMUP, "--trainer.limit_train_batches=null", "--trainer.limit_val_batches=0"]
    with pytest.raises(MisconfigurationException, match="an epoch no known length, .* Set --trainer.max_steps, or"):
        fit(*args, model=Streamed)
    (config,) = fit(*args, "--trainer.max_steps=3", model=Streamed).trainer.lr_scheduler_configs
    assert config.scheduler.total_steps == 3
    fit(*args, "--trainer.limit_train_batches=0", model=Streamed)  # nothing to schedule


def test_an_unknown_interval_is_refused():
    with pytest.raises(ValueError, match="`scheduler_interval` must be 'step' or 'epoch', got 'batch'"):
        MemOptCLI(Tiny, scheduler_interval="batch")


@pytest.mark.parametrize("form", ["optimizer", "dict", "lists"])
def test_an_optimizer_of_the_module_is_bound(form):
    cli = fit(f"--model.form={form}", model=WithOptimizer)
    (optimizer,) = cli.trainer.optimizers
    assert [block.name for block in optimizer.snapshot().blocks] == [name for name, _ in cli.model.named_parameters()]
    assert optimizer.param_groups[0]["lr"] == pytest.approx(0.01 if form == "optimizer" else 0.001)


def test_given_names_are_kept():
    (block,) = fit(model=Inner).trainer.optimizers[0].snapshot().blocks
    assert (block.name, block.rank) == ("lm_head.weight", 3)


def test_resume_and_validate_from_a_checkpoint(tmp_path):
    args = [arg for arg in QUIET if "checkpointing" not in arg and "epochs" not in arg]
    args += ["--optimizer=lightning_memopt.AdaPMLean", f"--trainer.default_root_dir={tmp_path}"]
    MemOptCLI(Tiny, args=["fit", *args, "--trainer.max_epochs=1"])
    (checkpoint,) = tmp_path.rglob("*.ckpt")
    resumed = MemOptCLI(Tiny, args=["fit", *args, "--trainer.max_epochs=2", f"--ckpt_path={checkpoint}"])
    assert resumed.trainer.optimizers[0].snapshot().step == 8
    validated = fit(f"--ckpt_path={checkpoint}", command="validate")
    assert "val_loss" in validated.trainer.callback_metrics


def test_missing_optimizer_says_how_to_give_one():
    with pytest.raises(MisconfigurationException, match=r"Tiny has no `configure_optimizers`.*--optimizer="):
        fit()


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--optimizer.recipe=adapm_leen"], r"'adapm_leen'.*adapm_lean"),
        (["--optimizer.recipe=nowhere.yaml"], r"nowhere\.yaml"),
        (["--optimizer.lr=-1"], r"lr.*-1"),
        (["--optimizer.overrides={'*.nothing': {'rank': 2}}"], r"'\*\.nothing' matches nothing"),
    ],
)
def test_bad_values_of_the_optimizer(args, message):
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        fit("--optimizer=lightning_memopt.MemOpt", *args)


def test_unknown_option_is_refused_by_the_parser(capsys):
    with pytest.raises(SystemExit):
        fit("--optimizer=lightning_memopt.AdaPMLean", "--optimizer.learning_rate=1")
    assert "learning_rate" in capsys.readouterr().err


def test_a_second_fit_keeps_the_config_of_the_first():
    Path("config.yaml").write_text("# mine\n")
    for lr in (0.1, 0.2):
        fit("--optimizer=lightning_memopt.AdaPMLean", f"--optimizer.lr={lr}")
    assert Path("config.yaml").read_text() == "# mine\n"
    saved = [yaml.safe_load(Path(f"config-v{version}.yaml").read_text()) for version in (1, 2)]
    assert [config["optimizer"]["init_args"]["lr"] for config in saved] == [0.1, 0.2]
    # What was saved can be run again.
    (optimizer,) = fit("--config=config-v2.yaml").trainer.optimizers
    assert optimizer.param_groups[0]["lr"] == 0.2


INTERPOLATED = """
model: {width: 8}
optimizer:
  class_path: lightning_memopt.AdaPMLean
  init_args: {rank: "${model.width}"}
"""


@pytest.mark.parametrize(
    ("mode", "override", "rank"),
    [
        ("omegaconf", [], 8),
        # Resolved when the file is read: the rank stays what the file says.
        ("omegaconf", ["--model.width=12"], 8),
        ("omegaconf+", [], 8),
        ("omegaconf+", ["--model.width=12"], 12),
    ],
)
@pytest.mark.parametrize("place", ["before", "after", "argument"])
def test_interpolation_and_overrides(mode, override, rank, place):
    Path("x.yaml").write_text(INTERPOLATED)
    flag = [f"--parser_mode={mode}"]
    args = [*(flag if place == "before" else []), "fit", *(flag if place == "after" else []), *QUIET, "--config=x.yaml"]
    kwargs = {"parser_mode": mode} if place == "argument" else {}
    cli = MemOptCLI(Tiny, args=[*args, *override, "--trainer.limit_train_batches=1"], **kwargs)
    assert cli.config.fit.optimizer.init_args.rank == rank
    assert cli.model.embed_tokens.embedding_dim == (12 if override else 8)


def test_yaml_mode_leaves_interpolations_alone(capsys):
    Path("x.yaml").write_text(INTERPOLATED)
    with pytest.raises(SystemExit):
        fit("--config=x.yaml")
    assert "${model.width}" in capsys.readouterr().err


def test_parser_mode_of_lightning_still_works():
    Path("x.yaml").write_text(INTERPOLATED)
    cli = fit("--config=x.yaml", parser_kwargs={"parser_mode": "omegaconf"})
    assert cli.config.fit.optimizer.init_args.rank == 8


def test_parser_mode_errors(capsys):
    with pytest.raises(ValueError, match="`parser_mode` must be one of yaml, omegaconf, omegaconf\\+, got 'json5'"):
        MemOptCLI(Tiny, parser_mode="json5")
    with pytest.raises(SystemExit):
        MemOptCLI(Tiny, args=["--parser_mode=json5", "fit"])
    assert "--parser_mode must be one of yaml, omegaconf, omegaconf+, got 'json5'" in capsys.readouterr().err
    Path("x.yaml").write_text("model: {width: 8}")
    with pytest.raises(SystemExit):
        fit("--config=x.yaml", "--parser_mode=omegaconf")
    assert "put it first" in capsys.readouterr().err


@pytest.mark.parametrize("missing", ["jsonargparse", "omegaconf", "lightning.pytorch"])
def test_missing_requirements_name_the_extra(missing, monkeypatch):
    monkeypatch.setitem(sys.modules, missing, None)
    for module in [name for name in sys.modules if name.startswith("lightning_memopt.cli.")]:
        monkeypatch.delitem(sys.modules, module)
    with pytest.raises(ImportError, match=r'pip install "lightning-memopt\[cli\]"'):
        _ = cli_module.MemOptCLI


def test_the_module_runs_and_finds_classes_of_the_working_directory(tmp_path):
    (tmp_path / "mine.py").write_text(
        "import lightning.pytorch as pl\n"
        "class Mine(pl.LightningModule):\n"
        "    def __init__(self, width: int = 1): super().__init__()\n"
    )
    script = Path(sys.executable).parent / "lightning-memopt"
    command = [str(script)] if script.is_file() else ["-m", "lightning_memopt"]
    done = run_python(*command, "fit", "--model=mine.Mine", "--model.width=7", "--print_config")
    assert done.returncode == 0, done.stderr
    assert yaml.safe_load(done.stdout)["model"] == {"class_path": "mine.Mine", "init_args": {"width": 7}}
