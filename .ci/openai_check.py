"""The OpenAI SDK against the gateway with its demo engine: chat, stream, models, and the errors it raises."""
from __future__ import annotations

import contextlib
import json
import os
import pathlib
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request

import openai

GOLLAMA = pathlib.Path(__file__).resolve().parent.parent / 'gollama.py'
KEY = 'a long secret'
QUESTION = [{'role': 'user', 'content': 'Say something.'}]


def free_port():
    with socket.create_server(('127.0.0.1', 0)) as listener:
        return listener.getsockname()[1]


@contextlib.contextmanager
def gateway():
    """Its address; one slot, and nobody may wait for it."""
    port = free_port()
    with tempfile.TemporaryDirectory(prefix='gollama-openai-') as directory:
        config = pathlib.Path(directory, 'config.json')
        config.write_text(json.dumps({'server': {'addr': f'127.0.0.1:{port}', 'api_keys': {'sdk': KEY}},
                                      'queue': {'max_concurrency': 1, 'max_waiting': 0}}))
        output = pathlib.Path(directory, 'output')
        with output.open('wb') as out:
            process = subprocess.Popen([sys.executable, str(GOLLAMA), '--config', str(config), '--demo'], cwd=directory,
                                       stdout=out, stderr=out, env={**os.environ, 'GOLLAMA_DEMO_DELAY': '0.05'})
        try:
            wait_until_ready(process, f'http://127.0.0.1:{port}/healthz')
            yield f'http://127.0.0.1:{port}/v1'
            process.terminate()
            assert process.wait(30) == 0, process.returncode
            assert 'Traceback' not in output.read_text(), 'a traceback'
        except BaseException:
            print(output.read_text(), file=sys.stderr)
            raise
        finally:
            process.kill()      # nothing, where it has ended
            process.wait()


def wait_until_ready(process, url):
    limit = time.monotonic() + 30
    while process.poll() is None and time.monotonic() < limit:
        with contextlib.suppress(OSError), urllib.request.urlopen(url, timeout=5):
            return
        time.sleep(0.05)
    raise SystemExit('the gateway did not become ready')


def raises(kind, call):
    try:
        call()
    except kind as error:
        return error
    raise AssertionError(f'no {kind.__name__}')


def main():
    with gateway() as url, openai.OpenAI(base_url=url, api_key=KEY, max_retries=0) as client:
        model = client.models.list().data[0].id

        def chat(max_tokens=4, **options):
            return client.chat.completions.create(model=model, messages=QUESTION, max_tokens=max_tokens, **options)

        answer = chat()
        assert answer.choices[0].message.content and answer.usage.completion_tokens == 4, answer

        with chat(8, stream=True) as stream:
            pieces = [chunk.choices[0].delta.content for chunk in stream if chunk.choices]
        assert len([piece for piece in pieces if piece]) > 1, pieces

        with chat(400, stream=True) as stream:      # holds the only slot
            next(iter(stream))
            refused = raises(openai.RateLimitError, chat)
        assert refused.status_code == 429 and refused.code == 'queue_full', refused
        assert int(refused.response.headers['Retry-After']) >= 1, refused.response.headers
        assert client.with_options(max_retries=5).models.list().data, 'and it goes on afterwards'

        with openai.OpenAI(base_url=url, api_key='wrong', max_retries=0) as stranger:
            refused = raises(openai.AuthenticationError, stranger.models.list)
        assert refused.code == 'invalid_api_key', refused
    print('openai', openai.__version__, 'ok')


if __name__ == '__main__':
    main()
