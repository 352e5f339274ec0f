"""Keeps the weights that validation liked best, and measures those: for text that is read too often.

    torchrun train.py config/babylm_10m.py config/best_weights.py

At every evaluation on the way, and at the end, the same part of the validation text is measured, and as much
training text, from the same sources: the gap between the two is what the model knows by heart. Where the last
weights are not the best, the closing evaluation is of the best, the checkpoint holds both, and result.json
says of which step they are: `measured_step`. Each costs twice an evaluation on the way: a 40th of the budget
where the closing one takes its tenth, on a card far less. What it did: where 114,000 tokens of text were read
121 times by 97,328 parameters (RESULTS.md, "Dolls"), the base ended at 3.44 bits per byte; the weights of a
tenth of the way, twelve epochs, had 2.74. A run of no more than those twelve, that slows down in time, ends
at 2.65: better than to keep is to stop.
"""
import math

import numpy as np

import sample
import train

eval_interval = 0.1
NOT_WITH = dict(ema='both say which weights are measured', domains='it reads no training text as it is measured')


class Run(train.Run):

    def take_model(self, model):
        """A model of another shape begins anew."""
        super().take_model(model)
        self.best = dict(step=0, bpb=math.inf, slices=0, weights=None)

    def bits(self, slices, stop=None, keep=True):
        result = super().bits(slices, stop, keep)
        if keep and stop is None and not self.all_reduce(np.array([float(bool(self.signals))]))[0]:
            self.weigh(result['bpb'], slices)
        return result

    def weigh(self, bpb, slices):
        """Keeps the weights if they are the best so far, and says what they make of the text they learned."""
        read = self.known_by_heart(slices / sample.SLICES)
        epochs = self.tokens / self.stream.epoch_tokens()
        self.record(step=self.steps, progress=self.clock.progress, tokens=self.tokens, train_bpb=read,
                    elapsed_s=self.clock.elapsed())
        self.say(f'         training text {read:.4f}, {bpb - read:.4f} less than validation, after '
                 f'{epochs:.2f} epochs')
        if bpb < self.best['bpb'] or slices != self.best['slices']:      # of other text: no comparison
            weights = {name: w.clone() for name, w in self.model.state_dict().items()}
            self.best = dict(step=self.steps, bpb=bpb, slices=slices, weights=weights)

    def known_by_heart(self, part):
        """Bits per byte of training text: of each source as many bytes as that part of validation has."""
        docs, val = self.data.docs['train'], self.data.docs['val']
        dice, bounds, some = np.random.default_rng(0), self.data.bounds('train'), []
        for source in np.unique(val['source']):
            mine = dice.permutation(np.flatnonzero(docs['source'] == source))
            wanted = part * val['bytes'][val['source'] == source].sum()
            some.extend(mine[:np.searchsorted(np.cumsum(docs['bytes'][mine]), wanted) + 1].tolist())
        mine = some[self.rank::self.world]
        texts = ((i, self.data.tokens['train'][bounds[i]:bounds[i + 1]]) for i in mine)
        with self.evaluating():
            nats = self.measure.read(self.model, texts, self.at_once).values()
        nats = sum(float(np.atleast_1d(n)[0]) for n in nats)
        nats, size = self.all_reduce(np.array([nats, float(docs['bytes'][mine].sum())]))
        return float(nats / math.log(2) / size)

    def closing_seconds(self):
        return super().closing_seconds() + 2 * self.slice_seconds * max(1, self.slices // 8) + self.save_seconds

    def finish(self):
        if not self.stopping:
            self.save()                          # before anything that takes long
            self.last_bpb = self.bits(max(1, self.slices // 8))['bpb']
        super().finish()

    def closing_evaluation(self):
        if self.best['step'] not in (0, self.steps):
            self.say(f'step {self.best["step"]} had {self.best["bpb"]:.4f} bits per byte, the last has '
                     f'{self.last_bpb:.4f} on the same text: the first is measured')
            self.model.load_state_dict(self.best['weights'])
        return super().closing_evaluation()

    def results(self, *found):
        return super().results(*found) | dict(measured_step=self.best['step'] or self.steps)

    def state(self):
        best = {k: v for k, v in self.best.items() if k != 'weights'}
        return super().state() | dict(evaluated=self.best['weights'], best=best)

    def load(self, state):
        super().load(state)
        weights = state['evaluated'] and {name: w.to(self.device) for name, w in state['evaluated'].items()}
        self.best = state['best'] | dict(weights=weights)
