"""`continuar convert`: real files both ways, and one clear line for each bad one."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from continuar.checkpoints.mar import OfficialFile, model_file, official_args, read_official, write_official
from continuar.checkpoints.store import CONFIG, EMA, WEIGHTS, PipelineConfig, read_pipeline_config
from continuar.cli.main import main as continuar
from continuar.errors import UserError
from continuar.heads import DiffusionOptions
from continuar.io import read_tensors, write_json, write_tensors
from continuar.pipeline import load
from continuar.tokenizers import LatentConfig, PixelConfig

from .files import content, convert, read, refused
from .layout import BASE, HUGE, LARGE, UNLIKE, Sizes, args, assert_same_bits, meta_state, state


@pytest.mark.parametrize("sizes", [Sizes(), UNLIKE, Sizes(heads=4, decoder_heads=1)], ids=["small", "unlike", "heads"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("weights", ["ema", "raw"])
def test_convert_there_and_back_keeps_every_bit(
    save: Callable[..., str], tmp_path: Path, sizes: Sizes, dtype: torch.dtype, weights: str
) -> None:
    source, saved, back = save(sizes, dtype), tmp_path / "model", tmp_path / "back.pth"
    assert convert([source, str(saved), "--weights", weights]) == 0
    assert convert([str(saved), str(back)]) == 0
    found = read(back)
    assert found.keys() == {"model", "model_ema", "args"}
    expected = state(sizes, dtype, {"raw": 1, "ema": 2}[weights])
    assert_same_bits(found["model"], expected)
    assert_same_bits(found["model_ema"], expected)
    told = {k: v for k, v in vars(args(sizes)).items() if k not in ("blr", "lr", "vae_path", "dist_on_itp")}
    assert {k: getattr(found["args"], k) for k in told} == told


def test_convert_keeps_what_args_say_of_training(save: Callable[..., str], tmp_path: Path) -> None:
    told = {"attn_dropout": 0.0, "proj_dropout": 0.25, "mask_ratio_min": 0.5, "diffusion_batch_mul": 2}
    source = save(args=args(Sizes(), **told))
    convert([source, str(tmp_path / "model")])
    config = read_pipeline_config(tmp_path / "model").model
    assert (config.backbone.attention_dropout, config.backbone.dropout) == (0.0, 0.25)
    assert (config.backbone.mask_ratio_min, config.head.diffusion_batch_mul) == (0.5, 2)
    convert([str(tmp_path / "model"), str(tmp_path / "back.pth")])
    assert {k: getattr(read(tmp_path / "back.pth")["args"], k) for k in told} == told


def test_convert_writes_a_model_that_loads(save: Callable[..., str], tmp_path: Path) -> None:
    convert([save(UNLIKE, torch.bfloat16), str(tmp_path / "model")])
    pipe = load(tmp_path / "model", device="cpu")
    assert pipe.classes == ("0", "1", "2")
    assert pipe.config.tokenizer == LatentConfig("latent", "kl8", 48, 8, 4, 2, 0.2325)
    expected = state(UNLIKE, torch.bfloat16, 2)["decoder_pos_embed_learned"][0].float()
    found = pipe.model.state_dict()["backbone.decoder_positions"]
    torch.testing.assert_close(found, expected, rtol=0, atol=0, equal_nan=True)


def test_convert_prints_what_it_did(save: Callable[..., str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source, saved = save(UNLIKE, torch.bfloat16), str(tmp_path / "model")
    convert([source, saved])
    millions = sum(v.numel() for v in state(UNLIKE).values()) / 1e6
    assert capsys.readouterr().out.splitlines() == [
        f"read     {source} (model_ema)",
        "model    width 64 / 32, 2 + 3 blocks, 4 / 2 heads; diffusion MLP 2 x 6",
        "tokens   3 x 3 of dim 16; 3 classes",
        f"weights  {millions:.2f} M parameters in {len(state(UNLIKE))} tensors, bfloat16",
        f"written  {saved}",
    ]
    convert([saved, str(tmp_path / "back.pth")])
    assert "note     the source has one set of weights: 'model' and 'model_ema' both hold it" in capsys.readouterr().out


def test_convert_strips_the_prefix_of_distributed_training(save: Callable[..., str], tmp_path: Path) -> None:
    source = save(model_ema={f"module.{k}": v for k, v in state(Sizes()).items()})
    assert_same_bits(read_official(Path(source)).state, state(Sizes()))


def test_convert_reads_a_bare_state_dict(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    torch.save(state(Sizes()), tmp_path / "bare.pt")
    convert([str(tmp_path / "bare.pt"), str(tmp_path / "model"), "--heads", "4"])
    assert read_pipeline_config(tmp_path / "model").model.backbone.heads == 4
    assert read_pipeline_config(tmp_path / "model").tokenizer == LatentConfig(image_size=32)
    out = capsys.readouterr().out
    assert "(a bare state dict)" in out
    assert "note     args name no tokenizer; assumed: KL-16, images of 32 pixels" in out


def test_convert_reads_torchs_old_file_format(tmp_path: Path) -> None:
    torch.save(content(), tmp_path / "old.pth", _use_new_zipfile_serialization=False)
    assert_same_bits(read_official(tmp_path / "old.pth", "raw").state, state(Sizes(), seed=1))


def test_convert_accepts_the_1000_class_rows_of_early_official_code(
    save: Callable[..., str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sizes = replace(Sizes(), classes=1000)
    convert([save(sizes, args=args(sizes, class_num=200)), str(tmp_path / "model")])
    assert len(read_pipeline_config(tmp_path / "model").classes) == 1000
    assert "args.class_num is 200, but there are 1000 class embeddings; all are kept" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("sizes", "name", "guidance"),
    [(BASE, "mar_base", 2.9), (LARGE, "mar_large", 3.0), (HUGE, "mar_huge", 3.2), (UNLIKE, None, 3.0)],
    ids=["B", "L", "H", "unlike"],
)
def test_model_file_carries_the_papers_sampling_settings(sizes: Sizes, name: str | None, guidance: float) -> None:
    told = {"model": name} if name else vars(args(sizes))
    file, _ = model_file(OfficialFile(Path("mar.pth"), meta_state(sizes), told, "model_ema"))
    s = file.sampling
    assert (s.steps, s.guidance_scale) == (64 if name else 9, guidance)
    assert (s.guidance_schedule, s.temperature, s.head) == ("linear", 1.0, DiffusionOptions(diffusion_steps=100, sampler="ddpm"))
    assert file.tokenizer.spec == file.model.tokens
    assert official_args(file).get("model") == name


@pytest.mark.parametrize(
    ("told", "message"),
    [
        ({"img_size": 64}, r"args of .*img_size 64.* mean .*grid=\(4, 4\).*its tensors have .*grid=\(2, 2\)"),
        ({"vae_embed_dim": 4}, r"vae_embed_dim 4\) mean .*dim=4.*its tensors have .*dim=16"),
        ({"img_size": 40}, "image size 40 is not divisible"),
        ({"patch_size": "1"}, "args.patch_size of .* is '1'; int is expected"),
        ({"encoder_num_heads": True}, "args.encoder_num_heads of .* is True; int is expected"),
        ({"attn_dropout": "0.1"}, "args.attn_dropout of .* is '0.1'; float is expected"),
        ({"proj_dropout": 1.5}, "dropout is 1.5; allowed"),
        ({"mask_ratio_min": -1}, "mask_ratio_min is -1.0; allowed: 0 to 1"),
        ({"class_num": 4}, "args.class_num of .* is 4, but its tensors say: 3"),
        ({"buffer_size": 64}, "args.buffer_size of .* is 64, but its tensors say: 4"),
        ({"diffloss_w": 1024}, "args.diffloss_w of .* is 1024, but its tensors say: 6"),
        ({"diffloss_d": torch.zeros(2, 1)}, r"args.diffloss_d of .* is tensor\(\[\[0.\], \[0.\]\]\), but its tensors say: 2"),
        ({"encoder_depth": 3}, "args.encoder_depth of .* is 3, but its tensors say: 2"),
        ({"model": "mar_base"}, "args.model of .* is 'mar_base', but its tensors say: width 8, 2 [+] 1 blocks"),
        ({"encoder_num_heads": 3}, "is 3; allowed: a divisor of its width 8"),
    ],
    ids=lambda v: next(iter(v)) if isinstance(v, dict) else "",
)
def test_convert_refuses_args_that_contradict_the_tensors(
    save: Callable[..., str], tmp_path: Path, told: dict[str, Any], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        convert([save(args=args(Sizes(), **told)), str(tmp_path / "model")])
    assert [p.name for p in tmp_path.iterdir()] == ["mar.pth"]


def test_convert_ignores_model_names_that_are_not_the_papers(save: Callable[..., str], tmp_path: Path) -> None:
    assert convert([save(args=args(Sizes(), model=["mine"])), str(tmp_path / "model")]) == 0


def test_convert_needs_to_know_the_tokenizer(tmp_path: Path) -> None:
    torch.save(state(replace(Sizes(), channels=3)), tmp_path / "bare.pth")
    message = refused([str(tmp_path / "bare.pth"), str(tmp_path / "model"), "--heads", "2"])
    assert message.endswith(
        "bare.pth has tokens of dim 3, unlike KL-16, and no args that tell their tokenizer: "
        "img_size, vae_stride, patch_size, vae_embed_dim"
    )


@pytest.mark.parametrize(
    ("entries", "weights", "message"),
    [
        ({"model_ema": None}, "ema", "'model_ema'; it holds: model, optimizer, epoch, scaler, args; --weights raw takes 'model'"),
        ({"model_ema": ...}, "ema", "'model_ema'; it holds: model, optimizer, epoch, scaler, args; --weights raw takes 'model'"),
        ({"model": ...}, "raw", "'model'; it holds: model_ema, optimizer, epoch, scaler, args"),
        ({"model": {}, "model_ema": 3}, "ema", "'model_ema'; it holds: model, model_ema, optimizer, epoch, scaler, args"),
    ],
)
def test_convert_says_which_weights_a_file_holds(
    save: Callable[..., str], tmp_path: Path, entries: dict[str, Any], weights: str, message: str
) -> None:
    found = refused([save(**entries), str(tmp_path / "model"), "--weights", weights])
    assert found.endswith(f"mar.pth has no weights {message}")


def test_convert_names_missing_unexpected_and_misshapen_keys(save: Callable[..., str], tmp_path: Path) -> None:
    weights = {**state(Sizes()), "fake_latent": torch.zeros(1, 9), "extra": torch.zeros(1)}
    del weights["mask_token"]
    assert refused([save(model_ema=weights), str(tmp_path / "model")]).endswith(
        "mar.pth does not fit the model: missing: mask_token; unexpected: extra; "
        "of another shape: fake_latent (1, 9) instead of (1, 8)"
    )


def test_convert_replaces_a_saved_model_but_nothing_else(save: Callable[..., str], tmp_path: Path) -> None:
    source, saved = save(), tmp_path / "out" / "model"
    convert([source, str(saved)])
    convert([source, str(saved), "--weights", "raw"])
    assert sorted(p.name for p in saved.iterdir()) == [CONFIG, WEIGHTS]
    assert [p.name for p in saved.parent.iterdir()] == ["model"]
    fake = state(Sizes(), seed=1)["fake_latent"]
    assert_same_bits({"": read_tensors(saved / WEIGHTS)["condition.embedding"][3:]}, {"": fake})
    run = tmp_path / "run"
    (run / "checkpoints").mkdir(parents=True)
    (run / CONFIG).write_text("{}")
    assert "exists and is not a saved model" in refused([source, str(run)])
    assert sorted(p.name for p in run.iterdir()) == ["checkpoints", CONFIG]
    assert "is a file; a saved model is a directory" in refused([source, str(run / CONFIG)])


def test_convert_refuses_to_replace_the_directory_it_reads_from(save: Callable[..., str], tmp_path: Path) -> None:
    source, saved = Path(save()), tmp_path / "model"
    convert([str(source), str(saved)])
    source.rename(saved / "mar.pth")
    assert "mar.pth lies in" in refused([str(saved / "mar.pth"), str(saved)])
    assert (saved / "mar.pth").is_file()


def test_convert_reports_an_output_that_cannot_be_written(save: Callable[..., str], tmp_path: Path) -> None:
    source, saved = save(), str(tmp_path / "model")
    convert([source, saved])
    before = sorted(p.name for p in tmp_path.iterdir())
    assert "cannot be written: " in refused([source, f"{source}/model"])
    assert "cannot be written: " in refused([saved, f"{source}/back.pth"])
    assert sorted(p.name for p in tmp_path.iterdir()) == before


def test_write_official_leaves_nothing_when_the_disk_is_full(
    save: Callable[..., str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(content: object, handle: Any) -> None:
        handle.write(b"half")
        raise OSError(28, "No space left on device")

    convert([save(), str(tmp_path / "model")])
    (tmp_path / "old.pth").write_text("old")
    monkeypatch.setattr(torch, "save", full)
    message = refused([str(tmp_path / "model"), str(tmp_path / "old.pth"), "--overwrite"])
    assert message.endswith("old.pth cannot be written: No space left on device")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["mar.pth", "model", "old.pth"]
    assert (tmp_path / "old.pth").read_text() == "old"


def test_convert_overwrites_a_file_only_when_told(save: Callable[..., str], tmp_path: Path) -> None:
    saved, back = str(tmp_path / "model"), tmp_path / "back.pth"
    convert([save(), saved])
    back.write_text("mine")
    assert refused([saved, str(back)]).endswith("back.pth exists; --overwrite replaces it")
    assert back.read_text() == "mine"
    assert convert([saved, str(back), "--overwrite"]) == 0
    assert_same_bits(read(back)["model"], state(Sizes(), seed=2))
    (tmp_path / "folder.pth").mkdir()
    assert "folder.pth is a directory" in refused([saved, str(tmp_path / "folder.pth"), "--overwrite"])


def training_run(directory: Path, file: PipelineConfig, raw: dict[str, Tensor], ema: dict[str, Tensor]) -> None:
    checkpoint = directory / "checkpoints" / "step-00000007"
    checkpoint.mkdir(parents=True)
    write_json(checkpoint / CONFIG, file)
    write_tensors(checkpoint / WEIGHTS, raw)
    write_tensors(checkpoint / EMA, ema)


@pytest.mark.parametrize(("options", "seeds"), [([], (1, 2)), (["--weights", "ema"], (1, 2)), (["--weights", "raw"], (1, 1))])
def test_convert_writes_both_weights_of_a_run(
    save: Callable[..., str], tmp_path: Path, options: list[str], seeds: tuple[int, int]
) -> None:
    source, back = save(), tmp_path / "back.pth"
    for kind in ("raw", "ema"):
        convert([source, str(tmp_path / kind), "--weights", kind])
    file, raw, ema = (read_pipeline_config(tmp_path / "raw"), *(read_tensors(tmp_path / k / WEIGHTS) for k in ("raw", "ema")))
    training_run(tmp_path / "run", file, raw, ema)
    convert([str(tmp_path / "run"), str(back), *options])
    assert_same_bits(read(back)["model"], state(Sizes(), seed=seeds[0]))
    assert_same_bits(read(back)["model_ema"], state(Sizes(), seed=seeds[1]))


def test_convert_keeps_the_scale_of_other_tokens(
    save: Callable[..., str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sizes = replace(Sizes(), channels=3, patch=2)
    convert([save(sizes), str(tmp_path / "model")])
    file = replace(read_pipeline_config(tmp_path / "model"), tokenizer=PixelConfig(image_size=4, patch=2, std=0.3))
    write_json(tmp_path / "model" / CONFIG, file)
    convert([str(tmp_path / "model"), str(tmp_path / "back.pth")])
    assert "note     tokens are latents x 3.33333; official code has x 0.2325 written into it" in capsys.readouterr().out
    convert([str(tmp_path / "back.pth"), str(tmp_path / "again")])
    assert read_pipeline_config(tmp_path / "again").tokenizer == LatentConfig("latent", "pixels", 4, 1, 3, 2, 1 / 0.3)
    assert read_pipeline_config(tmp_path / "again").model == file.model


def test_write_official_refuses_weights_of_another_model(save: Callable[..., str], tmp_path: Path) -> None:
    convert([save(), str(tmp_path / "model")])
    file, weights = read_pipeline_config(tmp_path / "model"), read_tensors(tmp_path / "model" / WEIGHTS)
    del weights["backbone.mask_token"]
    with pytest.raises(UserError, match=r"the source does not fit the model: missing: backbone\.mask_token"):
        write_official(tmp_path / "back.pth", file, weights, weights)
    assert not (tmp_path / "back.pth").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["mar.pth", "back.pth"], "SRC and DST are both files"),
        (["model", "other"], "SRC model is not an official file, so DST must end in .pth; it is other"),
        (["model", "back.pt"], "so DST must end in .pth; it is back.pt"),
        (["mar.pth", "other", "--overwrite"], "--overwrite is for a DST ending in .pth"),
        (["model", "back.pth", "--heads", "2"], "--heads is 2; a saved model knows its own"),
        (["model", "back.pth", "--decoder-heads", "2"], "--decoder-heads is 2; a saved model knows its own"),
        (["modle", "back.pth"], "unknown model 'modle'; did you mean model"),
        (["mar.pth", "other", "--heads", "4"], "--heads is 4, but args of mar.pth say 2"),
        (["mar.pth", "other", "--decoder-heads", "4"], "--decoder-heads is 4, but args of mar.pth say 2"),
    ],
)
def test_convert_refuses_arguments_that_make_no_sense(
    save: Callable[..., str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str], message: str
) -> None:
    save()
    monkeypatch.chdir(tmp_path)
    convert(["mar.pth", "model"])
    assert message in refused(arguments)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["mar.pth", "model"]


def test_command_prints_one_line_and_returns_2(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert continuar(["convert", str(tmp_path / "absent.pth"), str(tmp_path / "model")]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.splitlines() == [f"continuar: error: {tmp_path / 'absent.pth'} cannot be read: No such file or directory"]
