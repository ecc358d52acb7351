"""The robot's image, as far as it can be judged without Docker: Dockerfile.jetson fits this repository, and its health check works."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import tomllib

from bundle.manifest import MANIFEST_NAME
from tests.bundles import Tiny, make_bundle

ROOT = Path(__file__).resolve().parent.parent
DOCKERFILE = (ROOT / "Dockerfile.jetson").read_text(encoding="utf-8")
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
HEAVY = {"torch", "transformers", "peft", "onnx", "onnxscript"}


def instructions() -> list[tuple[str, str]]:
    """Keyword and rest of every instruction, in order; comments dropped and continued lines joined, as Docker does it."""
    lines = [line for line in DOCKERFILE.splitlines() if not line.lstrip().startswith("#")]
    joined = re.sub(r"\\\n", "", "\n".join(lines))
    split = (line.partition(" ") for line in joined.splitlines() if line.strip())
    return [(keyword, rest.strip()) for keyword, _, rest in split]


def rest_of(keyword: str) -> list[str]:
    return [rest for found, rest in instructions() if found == keyword]


def positions(keyword: str, containing: str = "") -> list[int]:
    return [
        index for index, (found, rest) in enumerate(instructions()) if found == keyword and re.search(containing, rest)
    ]


def copied() -> list[str]:
    return [source.rstrip("/") for rest in rest_of("COPY") for source in rest.split()[:-1]]


def build_arguments() -> dict[str, str]:
    """Default of every ARG."""
    pairs = (rest.partition("=") for rest in rest_of("ARG"))
    return {name: value.strip('"') for name, _, value in pairs}


def install_command() -> str:
    """The RUN that installs jetvla."""
    [command] = [rest for rest in rest_of("RUN") if " -e " in rest]
    return command


def installed_extras() -> set[str]:
    found = re.findall(r'-e "\.\[([\w,-]+)\]"', install_command())
    assert len(found) == 1, "scripts/check_jetson_image finds the extras by this pattern too"
    return set(found[0].split(","))


def required(extras: set[str]) -> set[str]:
    """Distributions that jetvla[extras] names in pyproject.toml; extras of ours within extras are followed."""
    project = PYPROJECT["project"]
    lines = list(project["dependencies"])
    names: set[str] = set()
    for extra in extras:
        lines += project["optional-dependencies"][extra]
    for line in lines:
        match = re.match(r"([\w.-]+)(?:\[([\w,\s-]+)\])?", line)
        assert match is not None, line
        if match[1] == project["name"]:
            names |= required({extra.strip() for extra in match[2].split(",")})
        else:
            names.add(match[1].lower())
    return names


def test_base_is_a_build_argument() -> None:
    keywords = [keyword for keyword, _ in instructions()]

    assert keywords[:2] == ["ARG", "FROM"]
    assert rest_of("FROM") == ["${BASE_IMAGE}"]


def test_defaults_stand_in_the_table_of_jetpacks() -> None:
    """The table is what scripts/check_jetson_image resolves; defaults outside it would go unchecked."""
    rows = re.findall(r"^# [\d.]+ +\| [\d.]+ +\| [\d.]+ +\| (\S+) +\| (\S+)$", DOCKERFILE, re.MULTILINE)
    arguments = build_arguments()

    assert len(rows) >= 2
    assert not [row for row in rows if "r36.3" in row[0]], "JetPack 6.0 has TensorRT 8.6, which is refused"
    assert (arguments["BASE_IMAGE"], arguments["CUDA_BINDINGS"]) in rows


def test_document_names_every_base() -> None:
    document = (ROOT / "docs" / "jetson.md").read_text(encoding="utf-8")
    bases = set(re.findall(r"nvcr\.io/nvidia/[\w./-]+:[\w.-]+", DOCKERFILE)) - {build_arguments()["BASE_IMAGE"]}

    assert bases
    assert all(base in document for base in bases)


@pytest.mark.parametrize("source", copied())
def test_what_is_copied_exists_and_is_sent_to_docker(source: str) -> None:
    lines = (ROOT / ".dockerignore").read_text(encoding="utf-8").splitlines()
    rules = [line for line in lines if line and not line.startswith("#")]

    assert (ROOT / source).exists()
    assert rules[0] == "*"
    assert f"!{source}" in rules


def test_nothing_else_is_sent_to_docker() -> None:
    """A working tree holds checkpoints, environments and bundles of several GB."""
    lines = (ROOT / ".dockerignore").read_text(encoding="utf-8").splitlines()
    kept = {line.removeprefix("!") for line in lines if line.startswith("!")}

    assert kept == set(copied())


def test_every_package_is_copied_and_has_its_empty_folder_before() -> None:
    packages = {name.replace(".", "/") for name in PYPROJECT["tool"]["setuptools"]["packages"]}
    folders = set(install_command().partition("&&")[0].split()[2:])
    with_parents = folders | {str(Path(name).parent) for name in folders} - {"."}

    assert install_command().startswith("mkdir -p ")
    assert packages <= with_parents, "the editable installation needs a folder for each package of pyproject.toml"
    assert {name.partition("/")[0] for name in packages} <= set(copied())


def test_extras_exist_and_bring_nothing_heavy() -> None:
    extras = installed_extras()

    assert extras <= PYPROJECT["project"]["optional-dependencies"].keys()
    assert {"tokenizers", "h5py", "numpy"} <= required(extras)
    assert not required(extras) & HEAVY
    assert required({"export"}) & HEAVY == {"torch", "transformers", "peft", "onnx"}, "this test sees through extras"


def test_pinned_versions_are_used_and_the_bindings_installed_with_them() -> None:
    assert "-c constraints.txt" in install_command()
    assert "constraints.txt" in copied()
    assert '"${CUDA_BINDINGS}"' in install_command()
    assert "--system-site-packages" in DOCKERFILE, "TensorRT's bindings come with the base"


def test_user_is_not_root_and_comes_after_everything_that_needs_root() -> None:
    [user] = positions("USER")
    name = rest_of("USER")[0]

    assert name not in ("root", "0")
    assert build_arguments()["USER_UID"] not in ("", "0")
    assert max(positions("RUN", r"apt-get|pip install|useradd") + positions("COPY")) < user
    assert positions("RUN", rf"useradd .*\b{name}\b"), "nobody makes this user"


def test_entry_point_exists_and_is_found_from_any_folder() -> None:
    [entry] = rest_of("ENTRYPOINT")
    [home] = rest_of("WORKDIR")
    interpreter, script = json.loads(entry)

    assert interpreter == "python3"
    assert (ROOT / Path(script).relative_to(home)).is_file()
    assert rest_of("STOPSIGNAL") == ["SIGINT"], "as a first process Python ignores SIGTERM"


# --- the health check ---------------------------------------------------------------------------------------------------------


def health(bundle: Path, nodes: str = "/dev/null") -> subprocess.CompletedProcess[str]:
    """Run the image's health check here, as Docker would, with the repository in the place of the image's folder."""
    [rest] = rest_of("HEALTHCHECK")
    command = json.loads(rest[rest.index("CMD") + len("CMD") :])
    assert command[0] == "python3"
    return subprocess.run(
        [sys.executable, "-W", "error", *command[1:]],
        cwd=ROOT,
        env=os.environ | {"JETVLA_BUNDLE": str(bundle), "JETVLA_GPU_NODES": nodes},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


def test_health_check_reads_only_what_the_image_sets() -> None:
    [rest] = rest_of("HEALTHCHECK")
    environment = " ".join(rest_of("ENV"))

    names = re.findall(r"environ\['(\w+)'\]", rest)

    assert sorted(names) == ["JETVLA_BUNDLE", "JETVLA_GPU_NODES"]
    assert all(f"{name}=" in environment for name in names)


def test_healthy_with_a_whole_bundle_and_a_device(tmp_path: Path) -> None:
    result = health(make_bundle(tmp_path / "tiny.bundle", Tiny()), nodes="/dev/nowhere /dev/nul*")

    assert result.returncode == 0, result.stderr
    assert not result.stderr


def test_unhealthy_without_a_bundle(tmp_path: Path) -> None:
    result = health(tmp_path)

    assert result.returncode == 1
    assert f"no {MANIFEST_NAME}" in result.stderr


def test_unhealthy_when_a_file_is_missing_or_cut(tmp_path: Path) -> None:
    bundle = make_bundle(tmp_path / "tiny.bundle", Tiny())
    weights = bundle / "vision.fp32.onnx"
    weights.write_bytes(weights.read_bytes()[:-1])
    cut = health(bundle)
    weights.unlink()
    missing = health(bundle)

    assert (cut.returncode, missing.returncode) == (1, 1)
    assert "truncated or replaced" in cut.stderr
    assert "is missing" in missing.stderr


def test_unhealthy_when_the_manifest_was_changed(tmp_path: Path) -> None:
    bundle = make_bundle(tmp_path / "tiny.bundle", Tiny())
    manifest = bundle / MANIFEST_NAME
    manifest.write_text(manifest.read_text(encoding="utf-8").replace("bicubic", "bilinear"), encoding="utf-8")

    result = health(bundle)

    assert result.returncode == 1
    assert "changed after the build" in result.stderr


def test_unhealthy_without_a_gpu(tmp_path: Path) -> None:
    result = health(make_bundle(tmp_path / "tiny.bundle", Tiny()), nodes="/dev/nowhere /dev/nothing*")

    assert result.returncode == 1
    assert "no GPU here: none of ['/dev/nowhere', '/dev/nothing*']" in result.stderr
