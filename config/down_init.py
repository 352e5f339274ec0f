"""MLPs that do not begin at zero: their second matrices start at random, as all others do.

    torchrun train.py config/babylm.py config/down_init.py

Whence: the slowrun leaderboard's "output projections N(0, 1 / sqrt d) instead of 0" (2026), which reports 0.007 nats
where text is read sixteen times. The baseline's MLPs begin as nothing (Zhang 2019, 1901.09321), so at first their
first matrices learn nothing; its attention begins as copies (model.GPT). Expected: a tenth of a percent. What it did:
2.2043 bits per byte beside 2.2098 in a doll of config/babylm.py's half hour (one seed; RESULTS.md, "Dolls"): even.
"""
import model

down_init: float = 1.0       # 0..: where an MLP's second matrix starts, standard deviations of 1 / sqrt(its inputs)

NOT_WITH = dict(tokenformer='there are no matrices', growth='new layers have to begin as nothing',
                leaderboard='it starts otherwise', plain_gpt2='it starts otherwise')


class MLP(model.MLP):

    def __init__(self, config, *hidden):
        super().__init__(config, *hidden)
        self.down_init = config.down_init

    def init_weights(self):
        super().init_weights()
        self.down.weight.normal_(std=self.down_init * self.down.in_features ** -0.5)
