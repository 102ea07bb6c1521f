"""Names of backends: read, compared with devices, refused with what there is."""

import types

import jax
import pytest

from fcconv_jax.backends.generations import GENERATIONS, Generation
from fcconv_jax.backends.name import Backend, names
from fcconv_jax.backends.processes import topology
from fcconv_jax.backends.resolution import missing_extra, resolve
from fcconv_jax.messages.errors import BackendError
from fcconv_jax.messages.extras import install_command


def _device(platform, kind, version=""):
    client = types.SimpleNamespace(platform_version=version)
    return types.SimpleNamespace(platform=platform, device_kind=kind, client=client)


@pytest.mark.parametrize("name", names())
def test_every_name_reads_and_prints_as_itself(name):
    backend = Backend.parse(name)
    assert str(backend) == name
    assert Backend.parse(backend) is backend
    assert backend.size == 1


@pytest.mark.parametrize(
    ("text", "same"),
    [
        ("gpu", "cuda"),
        ("gpu:h100", "cuda:h100"),
        ("CUDA:H100", "cuda:h100"),
        ("tpu:v7x", "tpu:7x"),
        ("tpu:tpu7x", "tpu:7x"),
        (" tpu:v5e:16x16 ", "tpu:v5e:16x16"),
    ],
)
def test_other_spellings(text, same):
    assert str(Backend.parse(text)) == same


def test_a_new_tpu_generation_is_one_entry(monkeypatch):
    monkeypatch.setitem(GENERATIONS["tpu"], "8t", Generation(("TPU8t",), "tpu8t"))
    assert {str(Backend.parse(f"tpu:{kind}")) for kind in ("8t", "v8t", "tpu8t")} == {
        "tpu:8t"
    }


@pytest.mark.parametrize(
    "text",
    "npu tpu:v9 cuda:vh100 cuda:v5e cuda:h100:2x2 tpu:v5e: tpu:v5e:2 cpu:x "
    "tpu:v5e:2x2:1 tpu:2x2".split(),
)
def test_what_does_not_exist_is_refused_with_what_does(text):
    with pytest.raises(BackendError, match="no backend") as error:
        Backend.parse(text)
    assert repr(text) in str(error.value)
    assert all(name in str(error.value) for name in names())


def test_a_near_miss_is_named():
    with pytest.raises(BackendError, match="did you mean 'cuda:h100'"):
        Backend.parse("cuda:h10")


def test_a_topology_counts_its_chips_and_has_a_default():
    assert Backend.parse("tpu:v5e:16x16").size == 256
    assert Backend.parse("tpu:v4:2x2x4").size == 16
    assert topology(Backend.parse("tpu:v5e:16x16"))["topology_name"] == "v5e:16x16"
    assert topology(Backend.parse("tpu").target)["topology_name"] == "v5e:2x2"


@pytest.mark.parametrize(
    ("backend", "device", "same"),
    [
        ("cuda:h100", _device("gpu", "NVIDIA H100 80GB HBM3", "cuda 12090"), True),
        ("cuda:h200", _device("gpu", "NVIDIA H100 80GB HBM3", "cuda 12090"), False),
        ("cuda", _device("gpu", "NVIDIA GeForce RTX 4090", "cuda 12090"), True),
        ("cuda", _device("gpu", "AMD Instinct MI300X", "rocm 60300"), False),
        ("rocm", _device("gpu", "AMD Instinct MI300X", "rocm 60300"), True),
        ("tpu:v5e", _device("tpu", "TPU v5 lite"), True),
        ("tpu:v5p", _device("tpu", "TPU v5 lite"), False),
        ("tpu:v5p", _device("tpu", "TPU v5"), True),
        ("tpu:v5e", _device("tpu", "TPU v5"), False),
        ("tpu:v6e", _device("tpu", "TPU v6 lite"), True),
        ("tpu:7x", _device("tpu", "TPU7x"), True),
        ("tpu:v4", _device("cpu", "cpu"), False),
    ],
)
def test_devices_are_told_apart_by_their_kind(backend, device, same):
    assert Backend.parse(backend).describes(device) is same


def test_each_gpu_kind_has_its_target_description():
    for name in names():
        backend = Backend.parse(name)
        if backend.platform != "cuda" or backend.kind is None:
            continue
        config = topology(backend)["target_config"]
        assert f'name: "NVIDIA {backend.kind.upper()}' in config
        described = config.rpartition("device_description_str: ")[2].strip().strip('"')
        assert backend.describes(_device("gpu", described, "cuda"))


def test_resolution_of_what_is_here_and_of_what_is_not(monkeypatch):
    (device, *_) = jax.devices("cpu")
    found = resolve("cpu")
    assert (found.how, found.device, found.reason) == ("executed", device, "")
    assert resolve("rocm").how == "lowered"
    assert "cannot be compiled without a device" in resolve("rocm").reason

    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    monkeypatch.setattr("shutil.which", lambda name: None)
    for name in ("tpu:v4", "cuda:h100"):
        found = resolve(name)
        assert found.how == "lowered"
        platform = name.partition(":")[0]
        assert install_command(f"{platform}-aot") in found.reason

    monkeypatch.setattr("importlib.util.find_spec", lambda name: object())
    assert resolve("tpu:v4").how == resolve("cuda:h100").how == "compiled"
    assert resolve("tpu:v4").reason == "no tpu:v4 device is present"


def test_a_topology_larger_than_what_is_here_is_not_executed(monkeypatch):
    monkeypatch.setattr(
        jax, "devices", lambda name: [_device("tpu", "TPU v5 lite")] * 4
    )
    assert resolve("tpu:v5e:2x2").how == "executed"
    assert "only 4 of the 16" in resolve("tpu:v5e:4x4").reason


@pytest.mark.parametrize("platform", ["tpu", "cuda"])
def test_the_missing_part_is_named(platform, monkeypatch):
    monkeypatch.setattr("shutil.which", lambda name: None)
    monkeypatch.setattr(
        "importlib.util.find_spec", lambda name: None if "nvidia" in name else object()
    )
    missing = missing_extra(platform)
    assert ("ptxas" in missing) == (platform == "cuda")
    assert "flatbuffers" not in missing
