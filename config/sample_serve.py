"""--serve: a page and a JSON API, as OpenAI's, for one run or two.

    python sample.py --serve out/quickstart out/babylm                 until Ctrl-C; --compile makes it quicker
    python sample.py --serve out/babylm --retrieve notes               and passages of notes/ before each prompt

It listens to this machine alone; others need --host and a --token. What is asked of it stands in Handler.
Who asks is told which passages stand before a prompt, at most --passages.
"""
import codecs
import collections
import concurrent.futures
import contextlib
import functools
import hmac
import http.server
import json
import math
import queue
import re
import secrets
import select
import socket
import threading
import time
from types import SimpleNamespace

import numpy as np
import torch

from config import UserError, at_home, refuse
from config.sample_chat import chat_ids
from config.sample_retrieve import open_passages
from model import GPT, KVCache, sample_token
from sample import DRAWN, Energy, as_json, compile_for, drawn_by, generates_otherwise, grid, open_run, page_with_hashes, windows, within

WITH = 'retrieve',
ROWS, WAITING, CONNECTIONS = 4, 32, 64      # answers made at once by a model, answers that may wait, sockets
BODY, TOKENS, PATIENCE = 65536, 2048, 20    # bytes of a request, tokens of an answer, seconds to send or take it
USUAL = dict(temperature=0.8, top_k=0, top_p=1.0, min_p=0.0, repetition_penalty=1.0, seed=1, max_tokens=256)


class Declined(Exception):
    """A request that is answered with a status and a sentence."""

    def __init__(self, status, sentence):
        super().__init__(sentence)
        self.status = status


def numbers_of(body, usual):
    """How tokens are drawn, by what a request says."""
    found = {}
    for name, (low, high) in (DRAWN | dict(seed=(0, 2 ** 63 - 1), max_tokens=(1, TOKENS))).items():
        value = usual[name] if body.get(name) is None else body[name]
        if type(value) not in (int, type(usual[name])) or not low <= value <= high:
            whole = 'whole ' * isinstance(usual[name], int)
            raise Declined(400, f'{name} must be a {whole}number from {low:g} to {high:g}')
        found[name] = value
    return SimpleNamespace(**found)


def field_of(body, name):
    """A field that must hold text, in characters that UTF-8 has."""
    text = body.get(name)
    if not isinstance(text, str):
        raise Declined(400, f'{name} must be text')
    try:
        text.encode()
    except UnicodeEncodeError:
        raise Declined(400, f'{name} has half of a surrogate pair, which is no character') from None
    return text


class Answer:
    """A continuation that is being made: its dice, and in `events` what its reader gets, a dict a token, at
    last one with `why` it ended."""

    def __init__(self, lane, ids, chosen, options):
        self.lane, self.prompt, self.options = lane, ids, options
        self.ids, self.made, self.stopped, self.events = [*ids, *chosen], 0, False, queue.SimpleQueue()
        self.dice = torch.Generator(device=lane.device).manual_seed(options.seed)
        self.ends = lane.tokenizer.ends
        self.decoder = codecs.getincrementaldecoder('utf-8')(errors='replace')
        self.decoder.decode(b''.join(map(lane.tokenizer.token_bytes, chosen)))
        self.began = time.monotonic()

    def draw(self, logits):
        """Takes one more token by logits (V,); True if it was the last."""
        ids = torch.tensor([self.ids[-self.lane.model.config.block_size:]], device=logits.device)
        new = sample_token(logits[None], generator=self.dice, before=ids, **drawn_by(self.options)).item()
        if new in self.ends:
            return self.end('end')
        self.ids.append(new)
        self.made += 1
        told = self.lane.told(logits.log_softmax(-1), new)
        self.events.put(told | dict(text=self.decoder.decode(self.lane.tokenizer.token_bytes(new))))
        return self.stopped and self.end('stopped') or self.made == self.options.max_tokens and self.end('length')

    def end(self, why):
        rest = self.decoder.decode(b'', final=True)
        seconds = max(time.monotonic() - self.began, 1e-9)
        self.events.put(dict(why=why, tokens=self.made, tok_per_sec=self.made / seconds, rest=rest))
        return True


class Lane:
    """A model that is served: up to ROWS answers side by side, each a row of one cache.

    A row's arithmetic does not know of the others, and there are always ROWS of them, or steps are compiled
    (GPT.compile_step), so an answer is the same whoever else is served.
    """

    def __init__(self, name, run, passages=None, most=0):
        other = generates_otherwise(run.model)
        refuse(other, f'{other} generates in a way of its own, which the server does not know: serve another run '
               f'than {run.folder}')
        self.name, self.run, self.model, self.tokenizer = name, run, run.model, run.tokenizer
        self.passages, self.most = passages, most            # of --retrieve, before a prompt
        self.device, self.waiting = run.model.wte.weight.device, collections.deque()
        alone = type(run.model).hints is not GPT.hints       # what it is told is of a prompt, not of a row
        self.rows, self.hints = [None] * (1 if alone else ROWS), {}
        self.read = [0] * len(self.rows)         # tokens that are in a row of the cache
        self.cache = KVCache(run.model, len(self.rows))
        self.cache.go_apart()
        self.made, self.tokens, self.seconds, self.joules = 0, 0, 0.0, 0.0     # made: since the desk was idle

    def told(self, logp, token, most=5):
        """What a reader is told of a token, by the model's own log-probabilities (V,)."""
        top, ids = logp.topk(min(most, len(logp)))
        others = [dict(id=i, text=self.tokenizer.decode([i]), p=math.exp(p)) for i, p in zip(ids.tolist(), top.tolist())]
        bits = -logp[token].item() / math.log(2)
        return dict(id=token, bits=bits, p=2 ** -bits, alternatives=others)

    def busy(self):
        return bool(self.waiting) or any(self.rows)

    @torch.no_grad()
    def step(self):
        """Lets waiting answers in, and gives every answer a token more."""
        began, size = time.monotonic(), self.model.config.block_size
        for row, answer in enumerate(self.rows):
            if answer is None and self.waiting:
                self.rows[row] = answer = self.waiting.popleft()
                self.take(row, answer, self.fill(row, answer.ids[-size:]))
        for row, answer in enumerate(self.rows):
            if answer is None:                   # it reads BOS at its start, over and over, and nobody hears it
                self.cache.clear(row)
            elif self.read[row] == size:         # the older half is forgotten, as in GPT.generate
                self.fill(row, answer.ids[-(size // 2):-1])
        if going := [(row, answer) for row, answer in enumerate(self.rows) if answer]:
            rows, cache, step = self.rows, self.cache, self.model.quick_step or self.model.step
            if self.model.quick_step and len(going) == 1:    # alone it is computed as beside others, and sooner
                (row, answer), = going
                rows, cache = [answer], cache.row(row)
            new = [[answer.ids[-1] if answer else self.tokenizer.bos] for answer in rows]
            logits = step(torch.tensor(new, device=self.device), cache, **self.hints)
            for row, answer in going:
                self.read[row] += 1
                self.take(row, answer, logits[rows.index(answer)])
        self.seconds += time.monotonic() - began

    def fill(self, row, ids):
        """A row of the cache reads ids from the start; the logits (V,) of what follows."""
        one, idx = KVCache(self.model, 1), torch.tensor([ids], device=self.device)
        self.hints, self.read[row] = self.model.hints(idx), len(ids)
        logits = self.model.step(idx, one, **self.hints)
        self.cache.take(row, one)
        return logits[0]

    def take(self, row, answer, logits):
        try:
            ended = answer.stopped and answer.end('stopped') or answer.draw(logits)
        except FloatingPointError as e:
            ended = answer.end(str(e))
        self.made += 1
        if ended:
            self.rows[row] = None

    @torch.no_grad()
    def known(self, x, y):
        """What is told of the tokens y (T,) that follow x (T,)."""
        idx = torch.from_numpy(x)[None].to(self.device)
        logits = self.model.logits(self.model.trunk(idx, **self.model.hints(idx)))[0]
        return [self.told(row.log_softmax(-1), token) for row, token in zip(logits, y.tolist())]


class Desk(threading.Thread):
    """The one thread that asks models: it goes round their lanes, a step each, and does what else is to be
    done with a model in between."""

    def __init__(self, lanes, energy):
        super().__init__(daemon=True)
        self.lanes, self.energy, self.jobs, self.news = {lane.name: lane for lane in lanes}, energy, queue.SimpleQueue(), threading.Event()
        self.start()

    def run(self):
        while True:
            self.news.wait()
            self.news.clear()
            before = self.energy.mark()
            while self.work():
                pass
            _, *spent = np.subtract(self.energy.mark(), before)
            made = max(1, sum(lane.made for lane in self.lanes.values()))
            for lane in self.lanes.values():
                lane.joules, lane.tokens, lane.made = lane.joules + sum(spent) * lane.made / made, lane.tokens + lane.made, 0

    def work(self):
        """One round; False when there was nothing to do."""
        busy = [lane for lane in self.lanes.values() if lane.busy()]
        for lane in busy:
            try:
                lane.step()
            except Exception as e:               # whatever it is, readers are told and the server lives on
                for answer in [*filter(None, lane.rows), *lane.waiting]:
                    answer.end(f'the model failed ({type(e).__name__})')
                lane.rows[:] = [None] * len(lane.rows)
                lane.waiting.clear()
        with contextlib.suppress(queue.Empty):
            work, done = self.jobs.get_nowait()
            busy.append(work)
            try:
                done.set_result(work())
            except Exception as e:
                done.set_exception(e)
        return bool(busy)

    def ask(self, work):
        """What work() returns, done between steps."""
        done = concurrent.futures.Future()
        self.jobs.put((work, done))
        self.news.set()
        return done.result()

    def begin(self, answer):
        lane = answer.lane
        if len(lane.waiting) >= WAITING:
            raise Declined(503, f'{WAITING} answers wait already: try again in a while')
        lane.waiting.append(answer)
        self.news.set()
        return answer


def about(lane, run, country):
    """What /api/models says of a model."""
    result = run.folder / 'result.json'
    known = json.loads(result.read_text()) if result.exists() else {}
    tokens = lane.tokens + lane.made
    return dict(id=lane.name, about=run.model.describe(), params=run.model.params()['total'],
                minutes=known['total_seconds'] / 60 if known else None, val_bpb=known.get('val_bpb'),
                co2_g_per_1000=lane.joules / lane.tokens / 3.6e3 * grid(country) if lane.tokens else None,
                tok_per_sec=tokens / lane.seconds if tokens and lane.seconds else None, block_size=run.model.config.block_size,
                chat=bool(run.tokenizer.roles), passages=lane.most, ideas=[name for name, _, named in run.state['ideas'] if named])


class Server(http.server.ThreadingHTTPServer):
    """Answers on a port; strangers get sentences. token: what a request must show, '' on loopback alone."""
    daemon_threads, request_queue_size = True, 64

    def __init__(self, host, port, lanes, energy, token, country):
        self.desk, self.token, self.country = Desk(lanes, energy), token, country
        self.open, self.reading = threading.BoundedSemaphore(CONNECTIONS), {}
        page, hashes = page_with_hashes('serve.html')
        self.page = page.encode()
        self.policy = '; '.join(["default-src 'none'", f"script-src {hashes}", f"style-src {hashes}", "connect-src 'self'",
                                 "img-src data:", "base-uri 'none'", "form-action 'none'", "frame-ancestors 'none'"])
        self.address_family = socket.AF_INET6 if ':' in host else socket.AF_INET
        try:
            super().__init__((host, port), Handler)
        except OSError as e:
            raise UserError(f'{host} port {port} cannot be listened on ({e.strerror}): choose another --port or '
                            f'--host') from e
        self.names = None if token else {'localhost', '127.0.0.1', '[::1]'}     # that a browser may know it by

    def process_request(self, request, address):
        if not self.open.acquire(blocking=False):
            with contextlib.suppress(OSError):
                request.sendall(b'HTTP/1.1 503 Busy\r\nContent-Length: 0\r\nConnection: close\r\n\r\n')
            return self.shutdown_request(request)
        self.reading[request] = time.monotonic()
        super().process_request(request, address)

    def process_request_thread(self, request, address):
        try:
            super().process_request_thread(request, address)
        finally:
            self.reading.pop(request, None)
            self.open.release()

    def service_actions(self):
        """Twice a second: who has not sent a whole request by now sends it too slowly."""
        for request, since in [*self.reading.items()]:
            if time.monotonic() - since > PATIENCE:
                with contextlib.suppress(OSError):
                    request.shutdown(socket.SHUT_RDWR)

    def handle_error(self, request, address):
        """Clients that go away, above all: nothing to tell."""


class Handler(http.server.BaseHTTPRequestHandler):
    """What is asked of a server, all in JSON but the page; what cannot be is {"error": sentence} with a 4xx.

    GET  /api/models    {models: [{id, about, params, minutes, val_bpb, co2_g_per_1000, tok_per_sec, block_size,
                        chat, passages: at most, ideas}], max_tokens}; null is not known
    POST /api/generate  {model, prompt or messages: [{role, content}], ids: chosen tokens to go on from, passages:
                        how many at most, query: the text that they fit, if not the prompt, and what USUAL names}
                        -> server-sent events: `start` {prompt: tokens, passages: [{file, number, score, text}]};
                        {id, text, bits, p, alternatives: [{id, text, p}]} a token; `done` {why: end|length|
                        stopped, tokens, tok_per_sec, rest: what is left of a character} or `error` {error}. Who
                        closes stops it.
    POST /api/score     {model, texts: [one or two]} -> {texts: [{bits, bytes, bpb, tokens}], prefers: 0|1|null}
    GET  /v1/models, POST /v1/completions, /v1/chat/completions: as OpenAI's clients expect, `stream` too

    bits and p are of the model's own distribution. Where there is a token: Authorization: Bearer <token>.
    """
    protocol_version, timeout, server_version, sys_version = 'HTTP/1.1', PATIENCE, 'halfhour', ''
    close_connection = True

    # -- what is asked

    def handle_one_request(self):
        super().handle_one_request()
        self.close_connection = True             # a request a connection: nothing of one can leak into the next

    def do_GET(self):
        self.answer({'/': self.front, '/api/models': self.models, '/v1/models': self.models_v1})

    def do_POST(self):
        self.answer({'/api/generate': self.generate, '/api/score': self.score, '/v1/completions': self.complete,
                     '/v1/chat/completions': self.complete})

    def answer(self, routes):
        self.begun = False
        try:
            self.check()
            if self.path not in routes:
                known = self.path in ('/', '/api/models', '/v1/models', '/api/generate', '/api/score',
                                      '/v1/completions', '/v1/chat/completions')
                raise Declined(405 if known else 404, 'this is not asked in this way' if known else 'there is no such page')
            if self.command == 'POST':
                self.body = self.read_body()
            self.server.reading.pop(self.request, None)
            routes[self.path]()
        except Declined as e:
            self.decline(e.status, str(e))
        except OSError:                          # the client went away
            pass
        except Exception as e:                   # of the model, whatever it be
            self.decline(500, f'the model failed ({type(e).__name__})')

    def check(self):
        """Refuses names that are not ours (a page elsewhere may have its own name point here), other pages'
        requests, and who does not know the token."""
        host, origin, names = self.headers.get('Host', ''), self.headers.get('Origin'), self.server.names
        if names and re.sub(r':\d+$', '', host) not in names:
            raise Declined(403, 'Host is not a name of this server: ask 127.0.0.1')
        if origin not in (None, f'http://{host}', f'https://{host}'):        # the latter of a proxy before it
            raise Declined(403, 'Origin is another page: open this server\'s own')
        given = self.headers.get('Authorization', '').removeprefix('Bearer ')
        if self.server.token and self.path != '/' and not hmac.compare_digest(given.encode(), self.server.token.encode()):
            raise Declined(401, 'Authorization must be "Bearer " and the token of this server')

    def read_body(self):
        kind, length = self.headers.get('Content-Type', ''), self.headers.get('Content-Length', '')
        if kind.partition(';')[0].strip().lower() != 'application/json':
            raise Declined(415, 'Content-Type must be application/json')
        if not re.fullmatch(r'\d{1,9}', length):
            raise Declined(411, 'Content-Length must be a number')
        if int(length) > BODY:
            raise Declined(413, f'a request may have {BODY} bytes at most')
        raw = self.rfile.read(int(length))
        if len(raw) < int(length):
            raise Declined(400, 'the request ends before its Content-Length')
        try:
            body = json.loads(raw.decode(), parse_constant=float)
        except (ValueError, RecursionError):
            raise Declined(400, 'the body must be JSON in UTF-8') from None
        if not isinstance(body, dict):
            raise Declined(400, 'the body must be an object, {...}')
        return body

    # -- what is said

    def say(self, status, kind, body, **headers):
        self.begun = True
        self.send_response(status)
        for name, value in {'Content-Type': kind, 'Content-Length': len(body), 'X-Content-Type-Options': 'nosniff',
                            'Cross-Origin-Resource-Policy': 'same-origin', 'Referrer-Policy': 'no-referrer',
                            'Cache-Control': 'no-store', 'Connection': 'close', **headers}.items():
            if value is not None:
                self.send_header(name, str(value))
        self.end_headers()
        self.wfile.write(body)

    def say_json(self, data, status=200):
        self.say(status, 'application/json', as_json(data).encode())

    def decline(self, status, sentence):
        if not self.begun:
            as_openai = self.path.startswith('/v1/')
            error = dict(message=sentence, type='invalid_request_error', param=None, code=None) if as_openai else sentence
            self.say_json(dict(error=error), status)

    def send_error(self, status, message=None, explain=None):
        """What http.server finds wrong with a request, said as all else is."""
        self.begun, self.path = False, getattr(self, 'path', '')
        with contextlib.suppress(OSError):
            self.decline(status, message or 'this is no request that the server knows')

    def log_message(self, *args):
        """Nothing is logged of what is asked."""

    def event(self, data, name=None):
        self.wfile.write((f'event: {name}\n' * bool(name) + f'data: {data if isinstance(data, str) else as_json(data)}\n\n').encode())

    # -- pages

    def front(self):
        self.say(200, 'text/html; charset=utf-8', self.server.page, **{'Content-Security-Policy': self.server.policy})

    def models(self):
        lanes = self.server.desk.lanes.values()
        self.say_json(dict(models=[about(lane, lane.run, self.server.country) for lane in lanes], max_tokens=TOKENS))

    def models_v1(self):
        self.say_json(dict(object='list', data=[dict(id=name, object='model', created=0, owned_by='halfhour')
                                                for name in self.server.desk.lanes]))

    def lane(self):
        name, lanes = self.body.get('model'), self.server.desk.lanes
        if not isinstance(name, str) or name not in lanes:
            raise Declined(404, f'model must be one of {", ".join(lanes)}')
        return lanes[name]

    def prompt(self, lane, chat):
        """Ids that an answer goes on from."""
        if not chat:
            return [lane.tokenizer.bos, *lane.tokenizer.encode(field_of(self.body, 'prompt'))]
        messages, roles = self.body['messages'], lane.tokenizer.roles
        if not roles:
            raise Declined(400, f'{lane.name} continues text and was not taught to chat: send a prompt')
        if not isinstance(messages, list) or not messages or not all(
                isinstance(m, dict) and m.get('role') in [*roles] and isinstance(m.get('content'), str) for m in messages):
            raise Declined(400, f'messages must be a list of {{role, content}}, role one of {", ".join(roles)}')
        said = [m | dict(content=field_of(m, 'content')) for m in messages]
        return chat_ids(lane.tokenizer, said, lane.model.config.block_size * 3 // 4)

    def passages(self, lane, ids, chosen, length):
        """ids with passages behind BOS, and those, best first: of --retrieve, before a prompt, not in a chat."""
        most = lane.most if self.body.get('passages') is None else self.body['passages']
        if type(most) is not int or not 0 <= most <= lane.most:
            raise Declined(400, f'passages must be a whole number from 0 to {lane.most}')
        if not most or 'messages' in self.body:
            return ids, []
        query = field_of(self.body, 'query' if self.body.get('query') is not None else 'prompt')
        taken, size = len(ids) - 1 + len(chosen), lane.model.config.block_size
        before, given = lane.passages.fitting(query, most, size, taken, length)
        return [ids[0], *before, *ids[1:]], given

    def generate(self):
        lane, chosen = self.lane(), self.body.get('ids') or []
        options, ids = numbers_of(self.body, USUAL), self.prompt(lane, 'messages' in self.body)
        if not isinstance(chosen, list) or len(chosen) > TOKENS or not all(
                type(i) is int and 0 <= i < lane.model.config.vocab_size for i in chosen):
            raise Declined(400, f'ids must be a list of at most {TOKENS} token ids')
        whole, given = self.passages(lane, ids, chosen, options.max_tokens)
        given = [dict(score=score, file=file, number=number + 1, text=text) for score, file, number, text in given]
        answer = self.server.desk.begin(Answer(lane, whole, chosen, options))
        self.say(200, 'text/event-stream', b'', **{'Content-Length': None})
        try:
            self.event(dict(prompt=[dict(id=i, text=lane.tokenizer.decode([i]), bits=None) for i in ids],
                            passages=given), 'start')
            for told in self.events_of(answer):
                if 'why' not in told:
                    self.event(told)
                elif told['why'] in ('end', 'length', 'stopped'):
                    self.event(told, 'done')
                else:
                    self.event(dict(error=told['why']), 'error')
        finally:
            answer.stopped = True

    def events_of(self, answer):
        """What an answer tells; a client that has gone away is noticed between two events."""
        while True:
            try:
                told = answer.events.get(timeout=0.25)
            except queue.Empty:
                if self.gone():
                    raise ConnectionError from None
                continue
            yield told
            if 'why' in told:
                return
            if self.gone():
                raise ConnectionError

    def gone(self):
        """Whether the client has closed: it has nothing more to send."""
        ready, _, _ = select.select([self.connection], [], [], 0)
        return bool(ready) and self.connection.recv(1, socket.MSG_PEEK) == b''

    def score(self):
        lane, texts = self.lane(), self.body.get('texts')
        if not isinstance(texts, list) or not 1 <= len(texts) <= 2:
            raise Declined(400, 'texts must be a list of one or two texts')
        texts = [field_of(dict(texts=text), 'texts') for text in texts]
        found = [self.scored(lane, text) for text in texts]
        bits = [f['bits'] for f in found]
        apart = len(bits) == 2 and bits[0] != bits[1]
        self.say_json(dict(texts=found, prefers=int(bits[1] < bits[0]) if apart else None))

    def scored(self, lane, text):
        """Bits of a text from its BOS on, and what is told of each of its tokens; a window at a time, so that
        answers go on meanwhile."""
        ids, decoder = np.array([lane.tokenizer.bos, *lane.tokenizer.encode(text)]), codecs.getincrementaldecoder('utf-8')()
        told = [token for window in windows(ids, lane.model.config.block_size)
                for token in self.server.desk.ask(functools.partial(lane.known, *window))]
        told = [token | dict(text=decoder.decode(lane.tokenizer.token_bytes(token['id']))) for token in told]
        bits, n = sum(token['bits'] for token in told), len(text.encode())
        return dict(bits=bits, bytes=n, bpb=bits / max(n, 1), tokens=told)

    # -- as OpenAI's clients expect

    def complete(self):
        chat, lane, b = self.path == '/v1/chat/completions', self.lane(), dict(self.body)
        if chat and 'messages' not in b:
            raise Declined(400, 'messages must be a list of {role, content}')
        prompt = b.get('prompt', '')
        self.body['prompt'] = prompt[0] if isinstance(prompt, list) and len(prompt) == 1 else prompt
        stops = b.get('stop') or []
        stops = [stops] if isinstance(stops, str) else stops
        if not isinstance(stops, list) or len(stops) > 4 or not all(isinstance(stop, str) and stop for stop in stops):
            raise Declined(400, 'stop must be a text or a list of four at most')
        if b.get('n') not in (None, 1):
            raise Declined(400, 'n must be 1')
        b['max_tokens'] = b.get('max_completion_tokens') or b.get('max_tokens')
        options = numbers_of(b, USUAL | dict(temperature=1.0, max_tokens=16 if not chat else 256))
        ids, _ = self.passages(lane, self.prompt(lane, chat), [], options.max_tokens)
        answer = self.server.desk.begin(Answer(lane, ids, [], options))
        try:
            self.told_as_openai(answer, lane, chat, stops, b.get('stream') is True)
        finally:
            answer.stopped = True

    def told_as_openai(self, answer, lane, chat, stops, streaming):
        name = f'{"chatcmpl" if chat else "cmpl"}-{secrets.token_hex(8)}'
        head = dict(id=name, created=int(time.time()), model=lane.name)
        kind = ('chat.completion' + '.chunk' * streaming) if chat else 'text_completion'

        def piece(text, why=None):
            said = (dict(delta=dict(content=text) if text or not why else {}) if streaming else
                    dict(message=dict(role='assistant', content=text))) if chat else dict(text=text)
            return head | dict(object=kind, choices=[dict(index=0, logprobs=None, finish_reason=why) | said])
        if streaming:
            self.say(200, 'text/event-stream', b'', **{'Content-Length': None})
        text, sent, why = '', 0, None
        for told in self.events_of(answer):
            if 'why' in told and told['why'] not in ('end', 'length', 'stopped'):
                raise Declined(500, told['why'])
            text += told.get('text', told.get('rest', ''))
            found = [text.find(stop) for stop in stops if stop in text]
            if found:
                text, why = text[:min(found)], 'stop'
            elif 'why' in told:
                why = dict(end='stop', length='length').get(told['why'], 'stop')
            # what may be the beginning of a stop waits
            held = max((n for stop in stops for n in range(1, len(stop)) if text.endswith(stop[:n])), default=0) if not why else 0
            if streaming and len(text) - held > sent:
                self.event(piece(text[sent:len(text) - held]))
                sent = len(text) - held
            if why:
                break
        if streaming:
            self.event(piece('', why))
            return self.event('[DONE]')
        usage = dict(prompt_tokens=len(answer.prompt), completion_tokens=answer.made,
                     total_tokens=len(answer.prompt) + answer.made)
        self.say_json(piece(text, why) | dict(usage=usage))


def options(add):
    add('--serve', action='store_true', help='answer on a page, and programs, for one run or two')
    add('--host', default='127.0.0.1', help='the address to serve on; another than this machine needs --token')
    add('--port', type=int, default=8000, help='0 takes one that is free')
    add('--token', default='', help='what requests to the server must show')


def main(args, of_ideas):
    """Answers requests until it is interrupted."""
    within(args, port=(0, 65535), **dict(passages=(1, 1000)) if 'retrieve' in args else {})
    loopback = args.host in ('127.0.0.1', 'localhost', '::1')
    refuse(not loopback and not args.token, f'--host {args.host} lets others in: give a --token that they must know, '
           f'or leave --host away')
    lanes = []
    for folder in filter(None, (args.run, args.prompt)):
        run = open_run(folder, args.device, of_ideas)
        name = run.folder.absolute().name
        name = name if name not in [lane.name for lane in lanes] else f'{name} (2)'
        found = [open_passages(run, at_home(args.retrieve)), args.passages] if 'retrieve' in args else []
        lanes.append(Lane(name, run, *found))
        if args.compile:
            compile_for(run, 1, len(lanes[-1].rows))
    server = Server(args.host, args.port, lanes, Energy(args.device, time.monotonic()), args.token, args.country)
    host = f'[{args.host}]' if ':' in args.host else args.host
    print(f'{", ".join(lane.name for lane in lanes)}: http://{host}:{server.server_address[1]}/'
          + f'#{args.token}' * bool(args.token) + '  (Ctrl-C ends it)', flush=True)
    with server:
        server.serve_forever()
