"""U-Net skips: the second half of the layers is given what the first half left, the last layer the first's.

    python train.py config/babylm.py config/skips.py

Whence: the slowrun leaderboard (2026), which reports 0.015 to 0.021 nats where text is read sixteen times.
Expected: half of that at our depth. What it did: 2.0846 bits per byte beside 2.0949 and 2.0936 (seeds 1, 2)
in a doll of config/babylm.py's half hour, twelve epochs (RESULTS.md, "Dolls"): 0.5 % better, one seed. At
65,576 parameters 2.2123 beside 2.2131, in a doll of config/nocap.py 1.9691 beside 1.9680 and 1.9696. Even.
"""
import torch

import model

skip_start: float = 0.1     # weight of a skip as training begins


class GPT(model.GPT):
    grows_deeper = False     # further layers would be given others' outputs
    page = '''
        Model.prototype.block = (block => function (layer, n) {
            const {x, t: {skips}} = this, {n_embd: C, n_layer: L} = this.config;
            if (layer === 0) this.left = [];
            if (layer >= L - skips.length) {
                const weight = skips[this.left.length - 1], left = this.left.pop();
                for (let i = 0; i < n * C; i++) x[i] += weight * left[i];
            }
            block.call(this, layer, n);
            if (layer < skips.length) this.left.push(x.slice(0, n * C));
        })(Model.prototype.block);'''

    def build(self, config):
        super().build(config)
        self.skips = torch.nn.Parameter(torch.empty(config.n_layer // 2))

    def init_weights(self):
        super().init_weights()
        self.skips.fill_(self.config.skip_start)

    def layers(self, x, context):
        x0, left = x.view_as(x), []
        for i, block in enumerate(self.blocks):
            if i >= len(self.blocks) - len(self.skips):
                x = x + self.skips[len(left) - 1].to(x.dtype) * left.pop()
            x = block(x, x0, context)
            left += [x] if i < len(self.skips) else []
        return x
