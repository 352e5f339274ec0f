"""sample.py --serve: what it answers, to whom, and that strangers do it no harm."""
import http.client
import json
import os
import random
import resource
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import sample
from config import sample_retrieve, sample_serve
from config.sample_chat import chat_ids
from prepare_data import UserError

JSON = {'Content-Type': 'application/json'}


def started(*folders, token='', passages=()):
    lanes = [sample_serve.Lane(name, sample.open_run(folder), *passages) for name, folder in folders]
    server = sample_serve.Server('127.0.0.1', 0, lanes, sample.Energy('cpu', time.monotonic()), token, 'world')
    threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
    return SimpleNamespace(server=server, port=server.server_address[1], lanes=lanes)


@pytest.fixture(scope='module')
def desk(finished):
    made = started(('a', finished[0]), ('b', finished[0]))
    yield made
    made.server.shutdown()
    made.server.server_close()


def ask(desk, path, body=None, headers=None, method=None, raw=None):
    """status, headers, body of a request."""
    line = http.client.HTTPConnection('127.0.0.1', desk.port, timeout=60)
    data = raw if raw is not None else json.dumps(body).encode() if body is not None else None
    line.request(method or ('GET' if data is None else 'POST'), path, data, {**(JSON if data is not None else {}), **(headers or {})})
    answer = line.getresponse()
    found = answer.status, answer.headers, answer.read()
    line.close()
    return found


def events(body):
    """[(name, data)] of server-sent events."""
    parts = [dict(line.split(': ', 1) for line in block.split('\n')) for block in body.decode().strip().split('\n\n')]
    return [(part.get('event'), json.loads(part['data']) if part['data'] != '[DONE]' else part['data']) for part in parts]


def generate(desk, prompt='Mia lost', **more):
    status, headers, body = ask(desk, '/api/generate', dict(model='a', prompt=prompt, max_tokens=12) | more)
    assert status == 200 and headers['Content-Type'] == 'text/event-stream', body
    return events(body)


def text_of(found):
    return ''.join(data['text'] for name, data in found if name is None) + found[-1][1].get('rest', '')


def test_an_answer_is_what_a_run_writes(desk, finished):
    run = sample.open_run(finished[0])
    ids = torch.tensor([[run.tokenizer.bos, *run.tokenizer.encode('Mia lost')]])
    for more in (dict(temperature=0), dict(temperature=0.9, top_k=20, top_p=0.9, seed=4), dict(temperature=1, min_p=0.1, repetition_penalty=1.3, seed=2)):
        told, options = generate(desk, max_tokens=100, **more), dict(more)
        dice = torch.Generator().manual_seed(options.pop('seed', 1))
        new = [i.item() for i in run.model.generate(ids, 100, generator=dice, **options)]
        new = new[:new.index(run.tokenizer.bos)] if run.tokenizer.bos in new else new
        assert [data['id'] for name, data in told if name is None] == new and text_of(told) == run.tokenizer.decode(new)


def test_what_is_told_of_a_token(desk):
    (start, prompt), *tokens, (name, done) = generate(desk, temperature=0)
    assert start == 'start' and prompt['prompt'][0]['text'] == '' and ''.join(t['text'] for t in prompt['prompt']) == 'Mia lost'
    assert name == 'done' and done['why'] in ('end', 'length') and done['tokens'] == len(tokens)
    for _, told in tokens:
        assert len(told['alternatives']) == 5 and told['alternatives'][0]['id'] == told['id'] and 2 ** -told['bits'] == pytest.approx(told['p'])
        assert sum(other['p'] for other in told['alternatives']) <= 1 + 1e-6
    again = generate(desk, temperature=0, ids=[told['id'] for _, told in tokens[:3]])
    assert [told['id'] for name, told in again if name is None][:len(tokens) - 3] == [told['id'] for _, told in tokens[3:]]


def test_every_reader_gets_the_answer_that_one_alone_gets(desk):
    """More than there are rows, of other lengths, on two models, at once."""
    wanted = [dict(prompt='Mia lost ' * n, seed=n, max_tokens=5 + 3 * n, model='ab'[n % 2]) for n in range(1, 11)]
    alone = [text_of(generate(desk, **w)) for w in wanted]
    with ThreadPoolExecutor(10) as pool:
        assert list(pool.map(lambda w: text_of(generate(desk, **w)), wanted)) == alone
    assert len({*alone}) > 5


def test_none_waits_for_a_long_answer_to_end(desk):
    ends = {}

    def timed(name, n):
        generate(desk, max_tokens=n, temperature=100.0)
        ends[name] = time.monotonic()
    threads = [threading.Thread(target=timed, args=args) for args in [*((f'long{i}', 1500) for i in range(3)), ('short', 3)]]
    for thread in threads:
        thread.start()
        time.sleep(0.05)
    for thread in threads:
        thread.join()
    assert ends['short'] < max(ends.values())


def test_who_goes_away_stops_his_answer(desk):
    body = json.dumps(dict(model='a', prompt='', max_tokens=2000, temperature=2)).encode()
    with socket.create_connection(('127.0.0.1', desk.port)) as line:
        line.sendall(b'POST /api/generate HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n' % len(body) + body)
        assert b'event: start' in line.recv(1000) + line.recv(1000)
        assert any(desk.lanes[0].rows) or desk.lanes[0].waiting
    deadline = time.monotonic() + 20
    while any(desk.lanes[0].rows) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not any(desk.lanes[0].rows)


def test_passages_of_a_folder_stand_before_a_prompt(finished, tmp_path):
    """As --retrieve has them on the command line; who asks is told which."""
    (tmp_path / 'notes').mkdir()
    (tmp_path / 'notes' / 'zoe.txt').write_text('Zoe has a red kite.')
    (tmp_path / 'notes' / 'tom.txt').write_text('Tom lost it.')
    run = sample.open_run(finished[0])
    passages = sample_retrieve.Passages(tmp_path / 'notes', run.tokenizer, 24, tmp_path / 'kept', print)
    made = started(('a', finished[0]), passages=(passages, 2))
    options, prompt = dict(model='a', max_tokens=6, temperature=0), 'A kite'

    def told(**more):
        (_, start), *tokens, _ = generate(made, **dict(prompt=prompt) | options | more)
        return [(p['file'], p['number'], p['text']) for p in start['passages']], [t['id'] for _, t in tokens], ''.join(t['text'] for t in start['prompt'])
    given, ids, shown = told()
    before = passages.before(prompt, 2, 64, 6)
    text = ''.join(sample.stream(run.model, run.tokenizer, prompt, 6, temperature=0, before=before))
    assert given == [('zoe.txt', 1, 'Zoe has a red kite.')] and shown == prompt and run.tokenizer.decode(ids) == text.rstrip('\ufffd')
    plain = told(passages=0)
    assert plain[0] == [] and plain[1] != ids                            # it reads them
    again = told(prompt='', ids=[*run.tokenizer.encode(prompt), *ids[:2]], query=prompt)        # as the page goes on from a token
    assert again[0] == given and again[1][:4] == ids[2:]
    assert told(query='who lost it')[0][0][0] == 'tom.txt' and told(prompt='')[0] == []
    status, _, body = ask(made, '/v1/completions', options | dict(prompt=prompt))
    usage = json.loads(body)['usage']
    assert status == 200 and usage['prompt_tokens'] == 1 + len(before) + len(run.tokenizer.encode(prompt))
    assert json.loads(ask(made, '/api/models')[2])['models'][0]['passages'] == 2
    for wrong in (3, -1, 'two', True, 1.0):
        status, _, body = ask(made, '/api/generate', options | dict(prompt=prompt, passages=wrong))
        assert status == 400 and json.loads(body)['error'] == 'passages must be a whole number from 0 to 2'
    made.server.shutdown()
    made.server.server_close()


def test_texts_are_scored(desk, finished):
    status, _, body = ask(desk, '/api/score', dict(model='a', texts=['Mia lost the kite.', 'kite the lost Mia.']))
    one, other = (found := json.loads(body))['texts']
    run = sample.open_run(finished[0])
    ids = [run.tokenizer.bos, *run.tokenizer.encode('Mia lost the kite.')]
    nats = sample.document_nats(run.model, [(0, np.array(ids))])[0]
    assert status == 200 and one['bits'] == pytest.approx(nats / np.log(2), rel=1e-4) and one['bpb'] == pytest.approx(one['bits'] / 18)
    assert sum(t['bits'] for t in one['tokens']) == pytest.approx(one['bits']) and found['prefers'] == int(other['bits'] < one['bits'])
    assert json.loads(ask(desk, '/api/score', dict(model='a', texts=['']))[2])['texts'][0]['bpb'] == 0


def test_a_model_that_fails_is_said_and_the_next_is_answered(desk, monkeypatch):
    def fails(*args, **more):
        raise RuntimeError('no memory')
    with monkeypatch.context() as m:
        m.setattr(desk.lanes[0].model, 'logits', fails)
        status, _, body = ask(desk, '/api/score', dict(model='a', texts=['Mia']))
        assert status == 500 and json.loads(body)['error'] == 'the model failed (RuntimeError)'
        assert generate(desk)[-1] == ('error', dict(error='the model failed (RuntimeError)'))
    assert generate(desk)[-1][0] == 'done'


def test_what_the_models_are(desk):
    generate(desk)
    known = json.loads(ask(desk, '/api/models')[2])
    a, b = known['models']
    assert (a['id'], b['id']) == ('a', 'b') and a['params'] > 1000 and a['val_bpb'] > 0 and a['chat'] is False and known['max_tokens'] == sample_serve.TOKENS
    assert a['tok_per_sec'] > 0 and a['ideas'] is not None


def test_openai_s_client(desk):
    openai = pytest.importorskip('openai')
    client = openai.OpenAI(base_url=f'http://127.0.0.1:{desk.port}/v1', api_key='none', max_retries=0)
    assert [m.id for m in client.models.list()] == ['a', 'b']
    whole = client.completions.create(model='a', prompt='Mia lost', max_tokens=12, temperature=0)
    parts = [*client.completions.create(model='a', prompt='Mia lost', max_tokens=12, temperature=0, stream=True)]
    assert whole.choices[0].text == ''.join(part.choices[0].text for part in parts) == text_of(generate(desk, temperature=0))
    assert whole.usage.total_tokens == whole.usage.prompt_tokens + whole.usage.completion_tokens and whole.choices[0].finish_reason in ('length', 'stop')
    stop = whole.choices[0].text[2:5]
    assert client.completions.create(model='a', prompt='Mia lost', max_tokens=12, temperature=0, stop=[stop]).choices[0].text == whole.choices[0].text.split(stop)[0]
    held = client.completions.create(model='a', prompt='Mia lost', max_tokens=12, temperature=0, stop=stop, stream=True)
    assert ''.join(part.choices[0].text for part in held) == whole.choices[0].text.split(stop)[0]
    with pytest.raises(openai.BadRequestError, match='was not taught to chat'):
        client.chat.completions.create(model='a', messages=[dict(role='user', content='Hello')])
    with pytest.raises(openai.NotFoundError, match='model must be one of a, b'):
        client.completions.create(model='c', prompt='')


def test_a_chat(desk, monkeypatch):
    """A tokenizer with roles: an answer ends where another role speaks."""
    tokenizer = desk.lanes[0].tokenizer
    monkeypatch.setattr(tokenizer, 'roles', dict(user=5, assistant=7), raising=False)
    assert chat_ids(tokenizer, [dict(role='user', content='Hi')]) == [tokenizer.bos, 5, *tokenizer.encode('Hi'), 7]
    status, _, body = ask(desk, '/v1/chat/completions', dict(model='a', messages=[dict(role='user', content='Hi')], max_tokens=4))
    assert status == 200 and json.loads(body)['choices'][0]['message']['role'] == 'assistant'
    told = events(ask(desk, '/api/generate', dict(model='a', messages=[dict(role='user', content='Hi')], max_tokens=4, seed=3))[2])
    assert told[-1][0] == 'done' and not {5, 7} & {data['id'] for name, data in told if name is None}
    for messages in ([], 'Hi', [dict(role='system', content='x')], [dict(role='user', content=3)]):
        assert ask(desk, '/v1/chat/completions', dict(model='a', messages=messages))[0] == 400


# ---- strangers

@pytest.mark.parametrize('more, says', [
    (dict(temperature=-1), 'temperature'), (dict(temperature='hot'), 'temperature'), (dict(top_k=1.5), 'top_k'), (dict(top_p=0), 'top_p'),
    (dict(min_p=2), 'min_p'), (dict(repetition_penalty=0), 'repetition_penalty'), (dict(seed=-1), 'seed'), (dict(seed=2 ** 70), 'seed'),
    (dict(max_tokens=0), 'max_tokens'), (dict(max_tokens=10 ** 9), 'max_tokens'), (dict(max_tokens=True), 'max_tokens'), (dict(ids='x'), 'ids'),
    (dict(ids=[-1]), 'ids'), (dict(ids=[10 ** 9]), 'ids'), (dict(prompt=3), 'prompt'), (dict(prompt='\ud800'), 'prompt'), (dict(model='c'), 'model'),
    (dict(model=None), 'model'), (dict(temperature=float('nan')), 'temperature'), (dict(temperature=float('inf')), 'temperature'), (dict(messages=[]), 'chat')])
def test_parameters_that_cannot_be(desk, more, says):
    status, _, body = ask(desk, '/api/generate', dict(model='a', prompt='x') | more)
    assert 400 <= status < 500 and says in json.loads(body)['error']


@pytest.mark.parametrize('path, options, status', [
    ('/nothing', {}, 404), ('/api/generate', {}, 405), ('/../sample.py', {}, 404), ('//etc/passwd', {}, 404), ('/api/models', dict(body={}), 405),
    ('/api/score', dict(raw=b'{}', headers={'Content-Type': 'text/plain'}), 415), ('/api/score', dict(raw=b'{'), 400), ('/api/score', dict(raw=b'\xff{}'), 400),
    ('/api/score', dict(raw=b'[]'), 400), ('/api/score', dict(raw=b'[' * 60000), 400), ('/api/score', dict(raw=b'1' * 10000), 400), ('/api/score', dict(raw=b' ' * 70000), 413),
    ('/api/score', dict(body=dict(model='a', texts=[])), 400), ('/api/score', dict(body=dict(model='a', texts=['a', 'b', 'c'])), 400),
    ('/api/score', dict(body={}, headers={'Content-Length': '-1'}), 411), ('/api/score', dict(body={}, headers={'Content-Length': '9' * 30}), 411),
    ('/api/models', dict(headers={'Host': 'evil.example'}), 403), ('/api/models', dict(headers={'Origin': 'http://evil.example'}), 403),
    ('/', dict(headers={'Host': 'localhost.evil.example'}), 403), ('/', dict(method='PUT'), 501), ('/', dict(method='OPTIONS'), 501)])
def test_requests_that_are_none(desk, path, options, status):
    found, headers, body = ask(desk, path, **options)
    assert found == status and 'Traceback' not in body.decode() and 'Access-Control-Allow-Origin' not in headers
    assert headers['X-Content-Type-Options'] == 'nosniff' and json.loads(body)['error']


def test_the_page_may_load_nothing_but_itself(desk):
    status, headers, page = ask(desk, '/')
    policy = headers['Content-Security-Policy']
    assert status == 200 and b'</html>' in page and "default-src 'none'" in policy and 'unsafe' not in policy and policy.count('sha256-') >= 2


def test_a_server_for_others_wants_a_token(desk, finished, monkeypatch):
    with pytest.raises(UserError, match='give a --token'):
        sample.main([str(finished[0]), '--serve', '--host=0.0.0.0', '--device=cpu'])
    with pytest.raises(UserError, match=rf'port {desk.port} cannot be listened on'):
        sample.main([str(finished[0]), '--serve', f'--port={desk.port}', '--device=cpu'])
    own = started(('a', finished[0]), token='secret')
    assert ask(own, '/')[0] == 200
    for given in (None, 'secre', 'Bearer secre', 'Bearer sécret'.encode()):
        assert ask(own, '/api/models', headers={} if given is None else {'Authorization': given})[0] == 401
    assert ask(own, '/api/models', headers={'Authorization': 'Bearer secret', 'Host': 'rented.example'})[0] == 200
    assert ask(own, '/api/models', headers={'Authorization': 'Bearer secret', 'Host': 'rented.example', 'Origin': 'http://evil.example'})[0] == 403
    assert ask(own, '/api/models', headers={'Authorization': 'Bearer secret', 'Host': 'rented.example', 'Origin': 'https://rented.example'})[0] == 200
    own.server.shutdown()


def test_too_many_at_once_are_told_so(desk, monkeypatch):
    monkeypatch.setattr(sample_serve, 'WAITING', 2)
    with ThreadPoolExecutor(12) as pool:
        found = [*pool.map(lambda _: ask(desk, '/api/generate', dict(model='a', prompt='', max_tokens=200, temperature=2))[0], range(12))]
    assert 503 in found and found.count(200) >= 2 and ask(desk, '/api/models')[0] == 200


def test_who_sends_slowly_does_not_hold_the_server(desk, monkeypatch):
    monkeypatch.setattr(sample_serve, 'PATIENCE', 0.5)
    slow = [socket.create_connection(('127.0.0.1', desk.port)) for _ in range(5)]
    for i in range(10):
        for s in slow:
            try:
                s.send(b'GET / HTTP/1.1\r\n'[i:i + 1])
            except OSError:
                pass
        time.sleep(0.2)
    assert generate(desk)[-1][0] == 'done' and not desk.server.reading
    for s in slow:
        s.close()


def hostile(dice):
    """Bytes that a stranger may send."""
    good = json.dumps(dict(model='a', prompt='x', max_tokens=3)).encode()
    head = b'POST %s HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n'
    paths = [b'/api/generate', b'/api/score', b'/v1/completions', b'/v1/chat/completions', b'/', b'/%00', b'/' + b'a' * 200]
    match dice.randrange(7):
        case 0:
            return dice.randbytes(dice.randrange(1, 300))
        case 1:
            return head % (dice.choice(paths), len(good)) + good[:dice.randrange(len(good))]
        case 2:
            body = bytearray(good)
            for _ in range(dice.randrange(1, 6)):
                body[dice.randrange(len(body))] = dice.randrange(256)
            return head % (dice.choice(paths), len(body)) + bytes(body)
        case 3:
            body = json.dumps({dice.choice(['model', 'prompt', 'ids', 'texts', 'messages', 'stop', 'n', 'stream', 'seed', 'max_tokens', 'top_k']):
                               dice.choice([None, [], {}, '', -1, 1e308, 10 ** 30, 'a', [[]], [None], True, '\ud800', [{'role': 'user'}]]) for _ in range(4)}
                              | dice.choice([{}, {'model': 'a'}])).encode()
            return head % (dice.choice(paths), len(body)) + body
        case 4:
            return b'GET / HTTP/1.1\r\n' + b''.join(b'X-%d: y\r\n' % i for i in range(dice.randrange(300))) + b'\r\n'
        case 5:
            return (head % (dice.choice(paths), dice.choice([0, 10 ** 8, len(good)]))).replace(b'HTTP/1.1', dice.choice([b'HTTP/9.9', b'', b'HTTP/1.1 x']))
        case _:
            return head % (b'/api/generate', len(good)) + good     # and gone before the answer


def send(port, data, wait):
    with socket.create_connection(('127.0.0.1', port), timeout=10) as s:
        s.settimeout(5)
        try:
            s.sendall(data)
            s.shutdown(socket.SHUT_WR) if wait else None
            return s.recv(65536) if wait else b''
        except OSError:
            return b''


def test_no_stranger_brings_it_down(desk):
    dice, before = random.Random(0), text_of(generate(desk, temperature=0))
    for _ in range(250):
        told = send(desk.port, hostile(dice), dice.random() < 0.8)
        assert b'Traceback' not in told and (not told or told.startswith(b'HTTP/') or told.startswith(b'{')), told[:200]
        assert not told.startswith(b'HTTP/1.1 500')
    assert text_of(generate(desk, temperature=0)) == before


@pytest.mark.long
def test_compiled_steps_answer_as_plain_ones_alone_and_beside_others(desk, finished):
    own = started(('a', finished[0]))
    sample.compile_for(own.lanes[0].run, 1, sample_serve.ROWS)
    assert own.lanes[0].model.quick_step
    wanted = [dict(prompt='Mia lost ' * n, max_tokens=90, temperature=0, seed=n) for n in range(6)] + [dict(max_tokens=60, seed=3)]
    alone = [text_of(generate(own, **w)) for w in wanted]
    with ThreadPoolExecutor(7) as pool:
        assert list(pool.map(lambda w: text_of(generate(own, **w)), wanted)) == alone
    assert [text_of(generate(desk, **w)) for w in wanted] == alone
    own.server.shutdown()


@pytest.mark.long
def test_fifty_clients_for_a_while(desk):
    """Valid, slow and hostile ones at once, HALFHOUR_SECONDS (30): every valid answer is that of one alone, memory stays."""
    wanted = [dict(prompt='Mia lost ' * n, seed=n, max_tokens=4 + n, model='ab'[n % 2]) for n in range(8)]
    alone, until, wrong, count = [text_of(generate(desk, **w)) for w in wanted], time.monotonic() + float(os.environ.get('HALFHOUR_SECONDS', 30)), [], [0, 0]

    def client(number):
        dice = random.Random(number)
        while time.monotonic() < until:
            if number % 5 == 0:
                send(desk.port, hostile(dice), dice.random() < 0.5)
                count[1] += 1
            elif number % 5 == 1:
                with socket.create_connection(('127.0.0.1', desk.port)) as s:
                    s.send(b'POST /api/sc')
                    time.sleep(dice.random() * 2)
            else:
                n = dice.randrange(8)
                status, _, body = ask(desk, '/api/generate', dict(max_tokens=12) | wanted[n])
                if status == 200 and text_of(events(body)) != alone[n] or status not in (200, 503):
                    wrong.append((status, n, body[-300:]))
                count[0] += status == 200
    with ThreadPoolExecutor(50) as pool:
        work = [pool.submit(client, number) for number in range(50)]
        time.sleep(5)
        early = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        for each in work:
            each.result()
    late = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    print(f'{count[0]} valid answers, {count[1]} hostile requests, {len(wrong)} wrong, {early / 1024:.0f} to {late / 1024:.0f} MB')
    assert not wrong and count[0] > 20 and late < early + 100 * 1024, wrong[:3]
