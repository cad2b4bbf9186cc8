"""All methods in one classifier: any subset trains, saves, loads and runs on several processes."""

import gc
import itertools

import pytest
import torch
from transformers import ResNetConfig, ViTConfig

from wsss_hf import CamClassifier, CamConfig
from wsss_hf.models.methods import METHODS

OPTIONS = {
    "drs": {},
    "icd": {"hidden_channels": 8},
    "plda": {"hidden": [16, 8], "pamr_iterations": 2, "pamr_dilations": [1, 2]},
    "d2cam": {"embedding_channels": 8},
    "contrast": {"scale": 0.5, "embedding": 8},
    "seam": {"projections": [8, 8], "embedding": 16, "scale": 0.5},
    "toco": {},
}
SUBSETS = [names for size in (0, 1, 2, len(OPTIONS)) for names in itertools.combinations(OPTIONS, size)]
TAGS = torch.tensor([[1.0, 0, 0], [0, 1, 1], [0, 0, 1], [1, 0, 0]])


def build(*names: str, **options) -> CamClassifier:
    torch.manual_seed(0)
    backbone = ResNetConfig(depths=[1, 1, 1], hidden_sizes=[8, 16, 24], embedding_size=8, layer_type="basic")
    methods = {name: OPTIONS[name] for name in names}
    config = CamConfig(backbone_config=backbone, id2label={0: "a", 1: "b", 2: "c"}, **methods, **options)
    model = CamClassifier(config).train()
    model.progress = 0.5
    return model


def images(count: int = 4) -> torch.Tensor:
    return torch.randn(count, 3, 64, 64, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("names", SUBSETS, ids="+".join)
def test_any_subset_trains_all_its_parameters(names):
    model = build(*names)
    output = model(images(), tags=TAGS)
    assert set(METHODS) >= set(names)
    assert all(any(key.startswith(name) for key in output.losses) for name in names if name != "drs")
    assert all(loss.dtype == torch.float32 and loss.ndim == 0 for loss in output.losses.values())
    torch.testing.assert_close(output.loss, sum(output.losses.values()))
    output.loss.backward()
    without = [name for name, p in model.named_parameters() if p.requires_grad and p.grad is None]
    assert without == []


def test_a_method_that_is_off_costs_nothing():
    plain = build()
    assert not any(name.startswith("methods") for name, _ in plain.named_parameters())
    assert list(plain(images(), tags=TAGS).losses) == ["classification"]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_all_of_them_in_mixed_precision_and_without_tags_stay_finite(dtype):
    model = build(*OPTIONS)
    for tags in (TAGS, torch.zeros_like(TAGS)):
        with torch.autocast("cpu", dtype=dtype):
            output = model(images(), tags=tags)
        output.loss.backward()
        assert output.loss.isfinite()
        assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_model_of_half_precision_trains_and_has_maps_as_one_of_single_precision(dtype):
    backbone = ViTConfig(hidden_size=8, num_hidden_layers=4, num_attention_heads=2, intermediate_size=16)
    methods = OPTIONS | {"attention": {"learn_heads": True}}
    losses, maps = {}, {}
    for precision in (torch.float32, dtype):
        torch.manual_seed(0)
        config = CamConfig(backbone_config=backbone, id2label={0: "a", 1: "b", 2: "c"}, **methods)
        model = CamClassifier(config).train().to(precision)
        model.progress = 0.5
        output = model(images().to(precision), tags=TAGS)
        output.loss.backward()
        assert all(p.grad.isfinite().all() for p in model.parameters() if p.requires_grad)
        losses[precision] = output.losses
        model.eval()
        for model.config.maps in ("attention", "d2cam", "icd", "seam"):
            maps[precision, model.config.maps] = model(images().to(precision)).maps
    assert all(name in " ".join(losses[dtype]) for name in methods if name != "drs")
    for name, loss in losses[dtype].items():
        torch.testing.assert_close(loss, losses[torch.float32][name], rtol=0.1, atol=0.05, msg=f"{name}: {losses}")
    for (precision, name), found in maps.items():
        torch.testing.assert_close(found, maps[torch.float32, name], rtol=0.1, atol=0.05, msg=f"{name}, {precision}")


def test_a_batch_without_tags_moves_no_statistics_and_adds_nothing_for_any_class():
    model = build(*OPTIONS)
    before = {name: value.clone() for name, value in model.methods.named_buffers() if "norm" not in name}
    output = model(images(), tags=torch.zeros_like(TAGS))
    output.loss.backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())
    assert all(torch.equal(model.methods.get_buffer(name), value) for name, value in before.items())
    about_maps = [name for name in output.losses if not name.endswith("classification")]
    assert len(about_maps) > 8 and all(output.losses[name] == 0 for name in about_maps)


def test_a_class_that_no_image_has_is_learnt_as_absent_and_keeps_its_statistics():
    model = build(*OPTIONS)
    tags = TAGS.clone()
    tags[:, 2] = 0
    for _ in range(2):
        output = model(images(), tags=tags)
        output.loss.backward()
    assert output.loss.isfinite()
    assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())
    assert model.methods["d2cam"].seen.tolist() == [True, True, False]
    assert (model.methods["d2cam"].prototypes[2] == 0).all() and (model.methods["icd"].running_means[2] == 0).all()
    model.eval()
    assert model(images()).cams.isfinite().all()


@pytest.mark.parametrize("shape", [(4, 2), (4, 4), (3, 3), (4,)])
def test_tags_of_another_width_are_refused_before_any_method_sees_them(shape):
    with pytest.raises(ValueError, match=r"tags: expected shape \(4, 3\), got "):
        build(*OPTIONS)(images(), tags=torch.zeros(shape))


def test_a_backbone_of_one_stage_is_refused_by_the_method_that_reads_two():
    backbone = ViTConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=2, image_size=32)
    with pytest.raises(ValueError, match=r"seam.stages: expected stages of this backbone \(-1 to 0\), got -2"):
        CamClassifier(CamConfig(backbone_config=backbone, seam={}))


def test_save_load_continue(tmp_path):
    model = build(*OPTIONS)
    model(images(), tags=TAGS)  # fills banks and running means
    model.save_pretrained(tmp_path)
    loaded = CamClassifier.from_pretrained(tmp_path)
    assert loaded.config.methods == model.config.methods
    for name, value in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], value), name
    assert loaded.state_dict()["methods.d2cam.seen"].any()


def test_methods_added_to_a_checkpoint_without_them_are_initialised(tmp_path):
    build().save_pretrained(tmp_path)
    loaded = CamClassifier.from_pretrained(tmp_path, **OPTIONS)
    fresh = dict(build(*OPTIONS).named_parameters())
    for name, parameter in loaded.methods.named_parameters(prefix="methods"):
        expected = fresh[name].std()
        assert parameter.isfinite().all()
        assert 0.5 * expected <= parameter.std() <= 2 * expected or parameter.numel() < 64, name
    assert not loaded.state_dict()["methods.d2cam.seen"].any()


@pytest.mark.parametrize("name", ["icd", "d2cam", "seam"])
def test_the_maps_that_make_the_masks_are_a_choice(name):
    model = build(name, maps=name).eval()
    output = model(images())
    assert output.maps.shape == output.cams.shape and (output.maps >= 0).all()
    assert not torch.equal(output.maps, output.cams)
    assert model.segmentation_scores(output, (64, 64), TAGS).shape == (4, 4, 64, 64)


def test_hidden_layers_are_as_wide_as_the_backbone_deserves(tmp_path):
    backbone = ResNetConfig(depths=[1], hidden_sizes=[1024], embedding_size=8)
    model = CamClassifier(CamConfig(backbone_config=backbone, icd={}, plda={}))
    assert (model.methods["icd"].config.hidden_channels, model.methods["plda"].config.hidden) == (128, [256, 128])
    model.save_pretrained(tmp_path)
    assert CamClassifier.from_pretrained(tmp_path).config.methods == model.config.methods
    assert model.config.icd.hidden_channels == 128


def test_maps_of_a_method_that_has_none_or_is_off():
    with pytest.raises(ValueError, match="maps: .* got 'drs'"):
        build("drs", maps="drs")
    with pytest.raises(ValueError, match="maps: .* got 'icd'"):
        build("drs", maps="icd")


def _train_step(rank: int, processes: int, address: str, folder: str):
    if processes > 1:
        torch.distributed.init_process_group("gloo", init_method=address, rank=rank, world_size=processes)
    # The whole batch twice over, so that every process sees the same mixture and only the reduction is tested.
    share = slice(rank * 4 // processes, (rank + 1) * 4 // processes)
    model = build("drs", "icd", "d2cam")
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.eval()
    wrapped = torch.nn.parallel.DistributedDataParallel(model) if processes > 1 else model
    wrapped(images()[share], tags=TAGS[share]).loss.backward()
    if rank == 0:
        gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
        torch.save({"gradients": gradients, "buffers": dict(model.named_buffers())}, f"{folder}/{processes}.pt")
    if processes > 1:
        # Were the wrapper its last holder, the group would end under Python's lock, for which its threads may wait.
        del wrapped
        gc.collect()
        torch.distributed.destroy_process_group()


@pytest.mark.slow
def test_two_processes_agree_with_one(tmp_path):
    _train_step(0, 1, "", str(tmp_path))
    address = f"file://{tmp_path}/rendezvous"
    arguments = (2, address, str(tmp_path))
    torch.multiprocessing.start_processes(_train_step, arguments, nprocs=2, daemon=True, start_method="fork")
    one, two = (torch.load(tmp_path / f"{processes}.pt") for processes in (1, 2))
    for part in ("gradients", "buffers"):
        assert one[part].keys() == two[part].keys()
        for name, value in one[part].items():
            torch.testing.assert_close(two[part][name], value, rtol=1e-3, atol=1e-4, msg=lambda m, n=name: f"{n}: {m}")
