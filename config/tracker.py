"""Follows a run with TensorBoard, Weights & Biases or MLflow: curves, tables, samples and, with the last two,
the checkpoint.

    pip install tensorboard
    python train.py config/babylm.py config/tracker.py                      TensorBoard, in the run's folder
    python train.py config/babylm.py config/tracker.py --tracker=wandb

The package must be there, and nothing of halfhour's own needs it: metrics.jsonl is always written, and has
everything. A tracker that is slow, away or broken costs a warning and at most 5 seconds, on the bill.
"""
import contextlib
import importlib.util
import math
import os
import queue
import re
import sys
import threading
import time
from pathlib import Path

import train
from prepare_data import refuse

tracker: str = 'tensorboard'  # tensorboard|wandb|mlflow: what follows the run


class Run(train.Run):

    def __init__(self, s, ideas):
        super().__init__(s, ideas)
        refuse(not importlib.util.find_spec(s.tracker), f'tracker {s.tracker} is not installed: pip install '
               f'{s.tracker}, or leave config/tracker.py away')
        self.tracker, self.saved = None, False

    def free(self):
        return super().free() | {'tracker'}

    def make_folder(self):
        super().make_folder()
        self.tracker = Tracker(self.s, self.changed, self.say)

    def record(self, **row):
        super().record(**row)
        if self.tracker:
            self.tracker.put(row)

    def afterwards(self):
        return super().afterwards() + Tracker.WAIT

    def save(self):
        error = super().save()
        self.saved = not error
        return error

    def closing_evaluation(self):
        if self.tracker and self.saved:
            self.tracker.put(self.out_dir / 'ckpt.pt')       # it travels during the evaluation
        return super().closing_evaluation()

    def results(self, result, evals, text):
        paid = self.paid()                                   # every rank is asked
        if self.tracker:
            self.tracker.put(dict(step=self.steps, bpb_per_source=result['per_source'], evals=evals, sample=text,
                                  **paid))
            self.tracker.finish()
        return super().results(result, evals, text)

    def close(self, code):
        super().close(code)
        if self.tracker and not self.tracker.finish():       # what it leaves behind may hang as Python ends
            sys.stderr.flush()
            os._exit(code)


class Tracker(threading.Thread):
    """Hands the rows of metrics.jsonl, and files, to the tracker that s names. In a thread of its own: one
    that is slow, away or broken costs the run a warning and, at its end, WAIT seconds."""
    WAIT = 5.0

    def __init__(self, s, changed, say):
        super().__init__(daemon=True)
        self.s, self.changed, self.say, self.waiting = s, changed, say, queue.Queue(1000)
        self.left_out, self.asked, self.done = 0, False, False
        self.start()

    def put(self, item):
        try:
            self.waiting.put_nowait(item)
        except queue.Full:
            self.left_out += 1

    def run(self):
        try:
            numbers, table, keep, close = open_tracker(self.s, self.changed)
            while (item := self.waiting.get()) is not None:
                if isinstance(item, Path):
                    keep(item)
                    continue
                step, found = item['step'], dict(leaves(item))
                numbers({k: v for k, v in found.items() if not isinstance(v, str) and k != 'step'}, step)
                for key, v in item.items():
                    if isinstance(v, dict) and v:
                        rows = [[k, n] for k, n in leaves(v) if not isinstance(n, str)]
                        table(key, ['name', 'value'], rows, step)
                    elif isinstance(v, str):
                        table(key, ['text'], [[v]], step)
            close()
            self.done = True
        except Exception as e:                  # whatever happens to a tracker, the run goes on
            why = (str(e).strip() or type(e).__name__).splitlines()[0]
            self.say(f'warning: {self.s.tracker} follows no longer ({why}); metrics.jsonl has everything')

    def finish(self):
        """Whether everything has arrived; waits for it once, WAIT seconds at most."""
        if self.is_alive() and not self.asked:
            self.asked, until = True, time.monotonic() + self.WAIT
            with contextlib.suppress(queue.Full):
                self.waiting.put(None, timeout=self.WAIT)
            self.join(max(0.0, until - time.monotonic()))
            if self.is_alive() or self.left_out:
                self.say(f'warning: {self.s.tracker} was too slow and lacks {self.left_out:,} rows, and '
                         f'{self.waiting.qsize():,} that wait; metrics.jsonl has everything')
        return self.done


def leaves(value, name=''):
    """(name, value) of what is known in dicts of dicts, names joined by slashes."""
    for key, v in value.items():
        if isinstance(v, dict):
            yield from leaves(v, f'{name}{key}/')
        elif v is not None and not (isinstance(v, float) and not math.isfinite(v)):
            yield f'{name}{key}', v


def open_tracker(s, changed):
    """What hands a tracker {name: number} at a step, a table (its name, columns, rows, step) and a file, and
    what closes it."""
    name, folder = re.sub(r'[^\w.-]', '-', Path(s.out_dir).name), Path(s.out_dir)

    def as_text(columns, rows):
        return '\n'.join(' | '.join(map(str, row)) for row in [columns, ['---'] * len(columns), *rows])

    if s.tracker == 'tensorboard':
        from torch.utils.tensorboard import SummaryWriter
        writer = SummaryWriter(folder / 'tensorboard')
        return (lambda row, step: [writer.add_scalar(key, v, step) for key, v in row.items()],
                lambda key, columns, rows, step: writer.add_text(key, as_text(columns, rows), step),
                lambda path: writer.add_text('file', str(path)), writer.close)     # it keeps none
    if s.tracker == 'wandb':
        import wandb
        run = wandb.init(project='halfhour', name=name, dir=folder, config=vars(s),
                         settings=wandb.Settings(console='off'))

        def keep(path):
            artifact = wandb.Artifact(name, 'model')
            artifact.add_file(str(path))
            run.log_artifact(artifact)
        return (lambda row, step: run.log(row, step=step), lambda key, columns, rows, step:
                run.log({key: wandb.Table(columns=columns, data=rows)}, step=step), keep, run.finish)
    import mlflow
    mlflow.set_experiment('halfhour')
    mlflow.start_run(run_name=name)
    mlflow.log_params(changed)
    return (lambda row, step: mlflow.log_metrics(row, step=step),
            lambda key, columns, rows, step: mlflow.log_text(as_text(columns, rows), f'{key}_{step}.md'),
            lambda path: mlflow.log_artifact(str(path)), mlflow.end_run)
