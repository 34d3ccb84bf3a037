"""Are Orthogonal and ActivationPenalty what Keras' regularizers are? Its numbers are of version 3.15.1, with torch."""

# They were made after `pip install keras==3.15.1` by this script, run with KERAS_BACKEND=torch, and with WEIGHT and
# INPUTS as below. Keras stores the kernel of a layer as (in, out).
#
#     keras.config.set_floatx("float64")
#     for mode in ("rows", "columns"):
#         kernel = torch.tensor(WEIGHT).T.double().requires_grad_()
#         value = keras.regularizers.OrthogonalRegularizer(0.1, mode)(kernel)
#         value.backward()
#         print(mode, value.item(), kernel.grad.T.tolist())
#     for regularizer in (keras.regularizers.L1(0.1), keras.regularizers.L2(0.1)):
#         dense = keras.layers.Dense(4, use_bias=False, activity_regularizer=regularizer)
#         dense.build((2, 3))
#         dense.kernel.assign(np.transpose(WEIGHT))
#         dense(torch.tensor(INPUTS).double())
#         dense.losses[0].backward()
#         print(dense.losses[0].item(), dense.kernel.value.grad.T.tolist())

import lightning.pytorch as L
import pytest
import torch
from torch import nn

from lightning_regularize import ActivationPenalty, WeightPenalty, activations
from lightning_regularize.penalties import Orthogonal
from tests.training.support import QUIET, make_trainer

pytestmark = QUIET

WEIGHT = [[1.0, 2.0, -1.0], [0.5, -1.0, 3.0], [2.0, 0.25, 1.0], [-1.0, 1.0, 0.5]]
INPUTS = [[1.0, -2.0, 0.5], [0.0, 3.0, -1.5]]
ORTHOGONAL = {
    "rows": (
        0.03051964988311132,
        [
            [0.004716624242888796, 0.002005912359229022, -0.0018657329528287163],
            [0.005441265560843303, -0.005678367936805506, -0.0006706723875001463],
            [0.001052021329537441, 0.0058634349609425675, 0.004709897081955158],
            [0.009541299483221716, -0.011156051393114853, -0.0091272235621294],
        ],
    ),
    "columns": (
        0.031216948727766675,
        [
            [-0.0022785625386741023, 0.001961434278796333, 0.0016443050430549186],
            [0.0016123601918783936, -0.0018925811083972085, -0.0008995868243488027],
            [0.0014608052148891689, -0.0021611305735810622, -0.002381327021069969],
            [-0.001588946160555074, 0.004086112630163809, -0.011350117078321774],
        ],
    ),
}
ACTIVITY = {
    "l1": (1.5125, [[-0.05, 0.25, -0.1], [0.05, -0.25, 0.1], [0.05, -0.25, 0.1], [-0.05, 0.25, -0.1]]),
    "l2": (
        7.896875,
        [[-0.35, 2.95, -1.3], [0.4, -3.05, 1.325], [0.2, -0.625, 0.2125], [-0.275, 1.225, -0.475]],
    ),
}


class Dense(L.LightningModule):
    """A step of SGD with rate 1 takes off what the penalty adds to a gradient of zero."""

    def __init__(self):
        super().__init__()
        self.dense = nn.Linear(3, 4, bias=False, dtype=torch.float64)
        self.dense.weight.data = torch.tensor(WEIGHT, dtype=torch.float64)

    def training_step(self, batch, batch_idx):
        self.outputs = self.dense(batch)
        return 0.0 * self.outputs.sum()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=1.0)


def gradient_of(callback):
    module = Dense()
    before = module.dense.weight.detach().clone()
    batches = torch.utils.data.DataLoader(torch.tensor(INPUTS, dtype=torch.float64), batch_size=2)
    make_trainer(callback, max_epochs=1).fit(module, batches)
    return before - module.dense.weight.detach(), module.outputs.detach()


@pytest.mark.parametrize(("in_keras", "mode"), [("rows", "columns"), ("columns", "rows")])
def test_orthogonal(in_keras, mode):
    value, expected = ORTHOGONAL[in_keras]
    weight = torch.tensor(WEIGHT, dtype=torch.float64)
    assert Orthogonal(mode).value(weight, 0.1).item() == pytest.approx(value, rel=1e-6, abs=0)
    found, _ = gradient_of(WeightPenalty(Orthogonal(mode), 0.1))
    torch.testing.assert_close(found, torch.tensor(expected, dtype=torch.float64), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("norm", ACTIVITY)
def test_activity(norm):
    value, expected = ACTIVITY[norm]
    found, outputs = gradient_of(ActivationPenalty(0.1, include=("dense",), norm=norm))
    assert 0.1 * activations.penalty(outputs, norm).item() == pytest.approx(value, rel=1e-6, abs=0)
    torch.testing.assert_close(found, torch.tensor(expected, dtype=torch.float64), rtol=1e-6, atol=1e-6)
