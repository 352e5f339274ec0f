"""Keeps the weights that validation liked best, and measures those: for text that is read too often.

    torchrun train.py config/babylm_10m.py config/best_weights.py

At every evaluation on the way, and at the end, the same part of the validation text is measured, and as much
of the training text: the gap between the two is what the model knows by heart. Where the last weights are not
the best, the closing evaluation is of the best, the checkpoint holds both, and result.json says of which step
they are: `measured_step`. An evaluation costs a 70th of the budget at most. Not yet measured.
"""
import math

import sample
import train

eval_interval = 0.1
NOT_WITH = dict(ema='both say which weights are measured')


class Run(train.Run):

    def take_model(self, model):
        """A model of another shape begins anew."""
        super().take_model(model)
        self.best = dict(step=0, bpb=math.inf, weights=None)

    def bits(self, slices, stop=None, keep=True):
        result = super().bits(slices, stop, keep)
        if keep and stop is None and not self.signals:           # on the way
            self.weigh(result['bpb'], slices)
        return result

    def weigh(self, bpb, slices):
        """Keeps the weights if they are the best so far, and says what they make of the text they learned."""
        docs, tokens = self.data.docs, self.data.tokens['train']
        share = docs['val']['bytes'].sum() / docs['train']['bytes'].sum()
        with self.evaluating():
            seen = sample.bits_per_byte(self.model, tokens, docs['train'], math.ceil(min(1, share) * slices),
                                        self.at_once, None, self.rank, self.world, self.all_reduce)['bpb']
        self.record(step=self.steps, progress=self.clock.progress, train_bpb=seen, val_bpb=bpb,
                    elapsed_s=self.clock.elapsed())
        self.say(f'         training text {seen:.4f}, {bpb - seen:.4f} less than validation, after '
                 f'{self.tokens / self.stream.epoch_tokens():.2f} epochs')
        if bpb < self.best['bpb']:
            weights = {name: w.clone() for name, w in self.model.state_dict().items()}
            self.best = dict(step=self.steps, bpb=bpb, weights=weights)

    def closing_seconds(self):
        return super().closing_seconds() + 2 * self.slice_seconds * max(1, self.slices // 8)

    def finish(self):
        if not self.stopping:
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
        return super().state() | dict(evaluated=self.best['weights'], best=[self.best['step'], self.best['bpb']])

    def load(self, state):
        super().load(state)
        step, bpb = state['best']
        weights = state['evaluated'] and {name: w.to(self.device) for name, w in state['evaluated'].items()}
        self.best = dict(step=step, bpb=bpb, weights=weights)
