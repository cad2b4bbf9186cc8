"""Checkpoints of ZeRO for another number of processes, as DeepSpeed writes them; without DeepSpeed."""

import pytest
import torch

from wsss_hf.training.zero import deal_out

SHAPES = {"three": torch.Size([3]), "four": torch.Size([2, 2])}  # 1 2 3, 4 5 6 7


def write(folder, states, models, **options):
    (folder / "tag").mkdir()
    for process, state in enumerate(states):
        content = {"optimizer_state_dict": state, "ds_config": {"zero_optimization": options}}
        torch.save(content, folder / f"tag/bf16_zero_pp_rank_{process}_mp_rank_00_optim_states.pt")
    for name, model in models.items():
        torch.save({"param_shapes": [SHAPES], "dp_world_size": len(states)} | model, folder / f"tag/{name}.pt")


def moments(values):
    return {"state": {0: {"step": torch.tensor(4.0), "momentum_buffer": torch.tensor(values)}}}


def dealt(folder, processes):
    """Path → what a process would write, as of when it is given."""
    written = {}
    for path, content in deal_out(folder, processes):
        torch.save(content, folder / "dealt")
        written[path] = torch.load(folder / "dealt")
    return written


@pytest.mark.parametrize(
    ("processes", "parts"),
    [(1, [[1, 2, 3, 4, 5, 6, 7, 0]]), (2, [[1, 2, 3, 4], [5, 6, 7, 0]]), (3, [[1, 2, 3, 4], [5, 6, 7, 0], 4 * [0]])],
)
def test_zero2_cuts_a_group_as_one(processes, parts, tmp_path):
    states = [
        # The weights are without the zeros that fill up the last process's.
        {"single_partition_of_fp32_groups": [torch.tensor(weights)], "base_optimizer_state": moments(state)}
        for weights, state in (([1, 2, 3, 4], [1, 2, 3, 4]), ([5, 6, 7], [5, 6, 7, 0]))
    ]
    write(tmp_path, states, {"mp_rank_00_model_states": {}})
    written = dealt(tmp_path, processes)
    assert written.pop("tag/mp_rank_00_model_states.pt")["dp_world_size"] == processes
    for process, (part, (path, content)) in enumerate(zip(parts, written.items(), strict=True)):
        assert path == f"tag/bf16_zero_pp_rank_{process}_mp_rank_00_optim_states.pt"
        state = content["optimizer_state_dict"]
        assert state["single_partition_of_fp32_groups"][0].tolist() == part
        assert state["base_optimizer_state"]["state"][0]["momentum_buffer"].tolist() == part
        assert state["base_optimizer_state"]["state"][0]["step"] == 4


@pytest.mark.parametrize(
    ("processes", "parts", "frozen"),
    [
        (1, [[1, 2, 3, 4, 5, 6, 7]], [[8, 9, 10]]),
        (3, [[1, 4, 5], [2, 6, 7], [3, 0, 0]], [[8], [9], [10]]),
        (4, [[1, 4], [2, 5], [3, 6], [0, 7]], [[8], [9], [10], [0]]),
    ],
)
def test_zero3_cuts_each_parameter(processes, parts, frozen, tmp_path):
    states = [
        {"fp32_flat_groups": [torch.tensor(part)], "optimizer_state_dict": moments(part)}
        for part in ([1, 2, 4, 5], [3, 0, 6, 7])
    ]
    models = {
        f"zero_pp_rank_{process}_mp_rank_00_model_states": {
            "frozen_param_shapes": {"frozen": torch.Size([3])},
            "frozen_param_fragments": {"frozen": torch.tensor(part)},
        }
        for process, part in enumerate([[8, 9], [10, 0]])
    }
    write(tmp_path, states, models)
    written = dealt(tmp_path, processes)
    assert len(written) == 2 * processes
    for process in range(processes):
        state = written[f"tag/bf16_zero_pp_rank_{process}_mp_rank_00_optim_states.pt"]["optimizer_state_dict"]
        assert state["fp32_flat_groups"][0].tolist() == parts[process]
        assert state["optimizer_state_dict"]["state"][0]["momentum_buffer"].tolist() == parts[process]
        model = written[f"tag/zero_pp_rank_{process}_mp_rank_00_model_states.pt"]
        assert model["dp_world_size"] == processes
        assert model["frozen_param_fragments"]["frozen"].tolist() == frozen[process]


def test_another_layout_is_refused(tmp_path):
    with pytest.raises(ValueError, match="not of DeepSpeed"):
        dealt(tmp_path, 2)
    state = {"single_partition_of_fp32_groups": [torch.ones(7)], "base_optimizer_state": moments([1, 2])}
    write(tmp_path, [state], {"mp_rank_00_model_states": {}}, round_robin_gradients=True)
    with pytest.raises(ValueError, match="round_robin_gradients: expected false, got true"):
        dealt(tmp_path, 2)
