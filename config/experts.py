"""A mixture of experts (DeepSeek-V3, 2412.19437): a shared MLP, and three of eight more for each token.

    torchrun train.py config/nocap.py config/experts.py --experts=12        98.6M parameters, of which a token meets 42M

Each is a quarter as wide as the plain MLP, so that a token costs what it does there. Which experts is a token's own
affinity and a bias that keeps the load even, without a loss; no token is dropped. On a GPU expert_kernels.py multiplies.
Expected: better by the step, and worse by the clock (nanochat's log), as many small matrix products are slower than one large.

Where parameters are free and compute is not it is the best of all that was tried: in a doll of config/nocap.py eight are
1.8 %, twelve 2.4 % (three seeds) under the base at equal FLOPs, twelve on 85 % of the text 2.0 % (RESULTS.md, "Dolls"); the gradients of
a step took a quarter longer on a CPU. What they take on a card is not known, so they are no default. In a doll of
config/tinystories.py at equal FLOPs 1.4817 beside 1.5767, 6.0 % (one seed). In ten minutes of a CPU, 3.3M parameters in a fifth of an
epoch, 1.5498 beside 1.5462 by the clock, on 82 % of the text (the plain model of as many parameters in all +1.0 %;
2026-11-21, commit 3f931df). Made smaller, to the plain model's parameters in all, they have not been tried.
"""
import torch
import torch.nn as nn

import model
from config import expert_kernels
from config.expert_kernels import experts_in_torch, experts_with_kernels, kernel_cases, sorted_pairs
from config.stacked_weights import GPT as CountedGPT, Run as StackedRun, Several
from model import Linear

experts: int = 8            # 1..: routed MLPs beside the one that all tokens pass
experts_top: int = 3        # 1..: how many of them a token passes; together they then are as wide as one MLP
expert_hidden: int = 0      # width of a routed one; 0 means mlp_hidden, that of the one that all pass
balance_lr: float = 0.01    # of the biases: a step against what each expert has too much of the load

NOT_WITH = {'domains': 'both change the MLP'}


class MLP(model.MLP):
    """An MLP for all tokens, and the experts_top of some more whose vectors e_i a token x is most akin to.

    y = F(x) + sum_i g_i F_i(x), g_i = s_i / sum of the chosen s, s_i = sigmoid(x e_i); chosen are the
    largest s_i + bias_i, and the optimizer steps the bias against the sign of what the expert gets too much
    (DeepSeek-V3, 2412.19437, without its auxiliary loss). No token is dropped.
    """

    def __init__(self, config):
        super().__init__(config)
        n, C, h, self.top = config.experts, config.n_embd, config.expert_hidden, config.experts_top
        h = h or config.mlp_hidden
        if self.top > n:
            raise ValueError(f'experts_top is {self.top}, and there are {n} experts')
        if h % 8 or C % 8:
            raise ValueError(f'experts {h} wide in a model {C} wide: PyTorch multiplies groups of rows by '
                             f'matrices of a multiple of 8, choose expert_hidden and n_embd so')
        self.router, self.bias = Linear(C, n), nn.Parameter(torch.empty(n))
        self.ups = Several(n, C, h * (2 if self.gated else 1), self.top)
        self.downs = Several(n, h, C, self.top)

    @classmethod
    def width(cls, config):
        return max(8, super().width(config) // (1 + config.experts_top) // 8 * 8)

    def forward(self, x, context):
        return super().forward(x, context) + self.routed(x.flatten(0, 1)).view_as(x)

    def routed(self, x):
        """(N, C) from x (N, C): rows in the order of their experts, one product for each, and back."""
        scores = self.router(x).float().sigmoid()
        chosen = (scores + self.bias).topk(self.top).indices                       # (N, k)
        gates = scores.gather(1, chosen)
        gates = gates / gates.sum(1, keepdim=True)
        order, load, ends = sorted_pairs(chosen, len(self.bias))
        ups, downs = (w.weight.to(x.dtype) for w in (self.ups, self.downs))
        if 'experts' in model.IN_USE and not self.gated:
            y = experts_with_kernels(x, ups, downs, gates, order, ends)
        else:
            y = experts_in_torch(x, ups, downs, gates, order, ends, self.gated)
        return Balance.apply(y, self.bias, load)

    def init_weights(self):
        """The routers begin as the experts' first matrices do, their biases at 0."""
        super().init_weights()
        for linear in (self.router, self.ups):
            linear.weight.normal_(std=self.up.in_features ** -0.5)
        self.downs.weight.zero_()
        self.bias.zero_()


class Balance(torch.autograd.Function):
    """y as it is; the gradient of bias is how far each expert's share of the load is above the mean. Its sign
    is what counts, so it is made too small to show in the gradients' norm."""

    @staticmethod
    def forward(ctx, y, bias, load):
        ctx.save_for_backward(1e-6 * (load / load.sum() - 1 / len(load)))
        return y.view_as(y)

    @staticmethod
    def backward(ctx, grad):
        return grad, *ctx.saved_tensors, None


class GPT(CountedGPT):

    def describe(self):
        c = self.config
        routed = f'{c.experts_top} of {c.experts} experts of {c.expert_hidden or c.mlp_hidden}'
        return f'{super().describe()}; {routed}'


class Run(StackedRun, expert_kernels.Run):

    def groups(self, model):
        """The biases go a step by the sign alone."""
        groups, biases = super().groups(model), [block.mlp.bias for block in model.blocks]
        mine = {id(bias) for bias in biases}
        groups['scalars']['params'] = [p for p in groups['scalars']['params'] if id(p) not in mine]
        groups['biases'] = dict(params=biases, base_lr=self.s.balance_lr, betas=(0.0, 0.0), eps=1e-30)
        return groups

    def shape_names(self):
        return [*super().shape_names(), 'experts', 'experts_top', 'expert_hidden']
