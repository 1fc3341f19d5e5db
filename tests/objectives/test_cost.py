"""What a training step of each method costs, in the products that it makes: multiples of flow matching's.

A forward is a third of flow matching's step. A derivative is a forward more of the rows that carry a tangent, and a
little more than that in attention.
"""

import copy

import family
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from meanflow.models import DiT
from meanflow.objectives import AveragedVelocity, Networks, TeacherVelocity

SIZE = {"input_size": 8, "patch_size": 2, "in_channels": 2, "hidden_size": 192, "depth": 3, "num_heads": 3}
SIZE["num_classes"] = 3
DERIVATIVE = 1.04 / 3  # measured 0.346 of the step, for attention's six products against two
FORWARD = 1 / 3
# method: its options, the training step, what it costs
COSTS = {
    "meanflow": ({"ratio": 1.0}, 0, 1 + DERIVATIVE),
    "meanflow, a quarter": ({"ratio": 0.25}, 0, 1 + DERIVATIVE / 4),
    "hybrid": ({}, 0, 2 + DERIVATIVE),
    "hybrid, a quarter": ({"ratio": 0.25}, 0, 1 + (1 + DERIVATIVE) / 4),
    "meanflow, from a teacher": ({"ratio": 0.25, "velocity": TeacherVelocity()}, 0, 1 + DERIVATIVE / 4 + FORWARD),
    "meanflow, over neighbours": ({"ratio": 0.25, "velocity": AveragedVelocity(group=8)}, 0, 1 + DERIVATIVE / 4),
    "meanflow, two intervals": ({"ratio": 0.25, "intervals": 2}, 0, 1 + 1 / 4 + 2 * DERIVATIVE / 4),
    "sct": ({}, 0, 1 + DERIVATIVE),
    "rcm, without a teacher": ({"distil": False, "guidance": 1.0}, 0, 1 + DERIVATIVE),
    "alpha_flow, derived": ({"ratio": 1.0, "alpha_end": 10}, 20, 1 + DERIVATIVE),
    "alpha_flow, composed": ({"ratio": 1.0, "alpha_end": 10}, 5, 1 + FORWARD),
    "esd": ({"ratio": 0.25}, 0, 1 + (DERIVATIVE + FORWARD) / 4),  # its own velocity is a forward
    "lsd": ({"ratio": 0.25}, 0, 1 + (DERIVATIVE + FORWARD) / 4),
    "psd": ({"ratio": 0.25}, 0, 1 + 2 * FORWARD / 4),
    "split_meanflow": ({"ratio": 0.5}, 0, 1 + 2 * FORWARD / 2),
    "shortcut": ({"ratio": 0.5, "guidance": 1.0}, 0, 1 + 2 * FORWARD / 2),
    "ct": ({}, 0, 1 + FORWARD),
    "ict": ({}, 0, 1 + FORWARD),
    "ect": ({}, 0, 1 + FORWARD),
    "imm": ({}, 0, 1 + FORWARD),
    "ayf": ({}, 0, 1 + DERIVATIVE + FORWARD),  # a teacher's velocity is a forward
    "scd": ({}, 0, 1 + DERIVATIVE + FORWARD),
    "emd": ({"ratio": 0.25}, 0, 1 + DERIVATIVE / 4 + FORWARD),
    "lmd": ({"ratio": 0.25}, 0, 1 + (DERIVATIVE + FORWARD) / 4 + 3 * FORWARD / 4),  # its velocity, on the diagonal
    "pfmm": ({"ratio": 0.25}, 0, 1 + 2 * FORWARD / 4 + 3 * FORWARD / 4),
    # jumps and averages; Heun steps of the teacher beside the first
    "ctm": ({}, 0, 2 + 6 * FORWARD + 2 * 16 * FORWARD),
    "cd": ({}, 0, 1 + 3 * FORWARD),  # two of the teacher
    "dmf": ({}, 0, 2 + DERIVATIVE),
    "tvm": ({}, 0, 2 + DERIVATIVE + 2 * FORWARD),
}


def flops(name, options, step):
    objective = type(family.objective_of(name))(**options)
    net = DiT(**SIZE)
    ema = copy.deepcopy(net).requires_grad_(False) if objective.target_decay(0) is not None else None
    teachers = {role: DiT(**SIZE).requires_grad_(False) for role in objective.teachers}
    draws = objective.draw((8, 2, 8, 8), step=step, generator=torch.Generator().manual_seed(0), spread=True)
    x, y = torch.randn(8, 2, 8, 8), torch.arange(8) % 3
    nets = Networks(ema=ema, learned=objective.learned_module(), **teachers)
    with FlopCounterMode(display=False) as counter:
        objective.loss(net, x, y, draws, nets).loss.backward()
    return counter.get_total_flops()


@pytest.mark.parametrize("case", COSTS)
def test_a_step_costs_its_forwards(case):
    options, step, expected = COSTS[case]
    ratio = flops(case.partition(",")[0], options, step) / flops("flow_matching", {}, 0)
    assert ratio == pytest.approx(expected, rel=0.005)
