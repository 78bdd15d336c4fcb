"""Models inside the package: that they load and generate as they are, and that an installation has them."""

import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

import continuar
from continuar.pipeline import SHIPPED, Pipeline, shipped_models
from tests.tiny import model_configs, model_file, shaken

ROOT = Path(__file__).parents[1]


@pytest.mark.skipif(not shipped_models(), reason="no model is shipped yet")
def test_shipped_models_generate_at_their_defaults() -> None:
    for name in shipped_models():
        assert sum(p.stat().st_size for p in (SHIPPED / name).iterdir()) <= 16_000_000
        pipe = continuar.load(name, device="cpu")
        labels = [0, len(pipe.classes) - 1] if pipe.classes else None
        images = pipe(labels, [0, 1])
        assert images.shape[0] == 2
        assert images.std() > 10  # not one colour
        assert (images[0] != images[1]).any()


def test_a_wheel_holds_every_shipped_model(tmp_path: Path) -> None:
    pytest.importorskip("setuptools", minversion="77")
    tree = tmp_path / "tree"
    shutil.copytree(ROOT / "src", tree / "src", ignore=shutil.ignore_patterns("__pycache__", "*.egg-info"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tree / name)
    config = model_configs()[0]
    Pipeline(model_file(config), shaken(config)).save_pretrained(tree / "src" / "continuar" / "shipped" / "tiny")
    options = ["--no-deps", "--no-build-isolation", "--no-index", "--quiet", "--wheel-dir", str(tmp_path / "wheels")]
    subprocess.run([sys.executable, "-m", "pip", "wheel", *options, str(tree)], check=True, capture_output=True)
    (wheel,) = (tmp_path / "wheels").iterdir()
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path / "site")
        models = {n for n in archive.namelist() if n.startswith("continuar/shipped/")}
    assert models >= {
        f"continuar/shipped/{m}/{f}" for m in ("tiny", *shipped_models()) for f in ("config.json", "model.safetensors")
    }
    script = "import continuar, sys; print(continuar.load('tiny', device='cpu')([0], 0).shape)"
    command = [sys.executable, "-c", f"import sys; sys.path.insert(0, {str(tmp_path / 'site')!r}); {script}"]
    done = subprocess.run(
        command, check=True, capture_output=True, text=True, cwd=tmp_path, env={"PATH": "", "OMP_NUM_THREADS": "1"}
    )
    assert done.stdout.strip() == "(1, 8, 8, 3)"
