#!/usr/bin/env python3
"""gollama: a gateway in front of one local llama-server.

It starts the engine, keeps it alive, waits until it is ready, lets a set number of requests
in at a time, queues the rest, and forwards the OpenAI API, streams included.

    python gollama.py --config config.json          with llama-server
    python gollama.py --config config.json --demo   with a built-in stand-in, to try it

The map. A section uses only what stands above it:

    Errors          what the gateway answers on its own account, as one table
    Configuration   every key with its default, its parser and its meaning, in one place
    Logging         logfmt lines, on stderr and in a rotating file
    Time            deadlines and the restart backoff
    Engine process  one llama-server: spawn, output pump, probe, polite stop, kill, guard
    Watchdog        keeps an engine running; says when a try may start
    HTTP messages   heads and body framing: pure functions of bytes, no socket
    Relay           connections, exchanges, and the one thread that watches and copies
    Admission       the queue: slots, order, the budget for request bodies
    Forwarding      a try on the engine's side of a request, and the second try
    Metrics         counters, histograms, the recent requests
    Status page     one HTML string
    HTTP front      reading, rules of admission, the listener, answering
    Demo engine     a small stand-in for llama-server, run as a child process
    Gateway         the whole: start, signals, reload, stop
    Command line    options, exit codes

Threads: main (waits for signals), accept (the listener), one a client connection (heads,
waiting, whole answers, the first millisecond of a lone stream), the relay (one epoll: watches
the clients of requests that last, copies streams), the watchdog, and for each engine an output
pump and a reaper.

The journey of a request, `GatewayHandler._respond` and `_forward`:

    read the head                               400 408 414 431
    may it?                                     403 401 404 405 503
    read the whole body                         400 408 413 429
    AdmissionQueue.admit: wait for a slot       429; the client may leave
    TryGate.enter: wait until a try may start   503 429; the client may leave
    send it to the engine, read the answer      engine died unheard: once more, alone
    ---- the commit point: the first byte of the answer leaves for the client ----
    the rest follows, whole or copied by the relay

Before the commit point every fault is a JSON error or a second try. After it the only honest
signals are an error event and a missing final chunk: a truncated answer never looks whole.

The engine's states are in `TRANSITIONS`; `Watchdog._change_state` is the only one to change them.

Locks: Log._writing, LogFile._lock, EngineProcess._signal_lock, TryGate._lock, Exchange._lock,
AdmissionQueue._lock, Metrics._lock, Connections._lock, Notifier._order. Each guards the fields named beside it;
none is held during anything that can wait, nor while another one is taken, so there is no order
among them. The relay's own state belongs to its thread; others post to its mailbox.
"""
from __future__ import annotations

import _thread
import argparse
import base64
import bisect
import collections
import contextlib
import dataclasses
import difflib
import enum
import errno
import functools
import hashlib
import hmac
import http.client
import http.server
import ipaddress
import itertools
import json
import math
import os
import platform
import re
import select
import selectors
import shlex
import shutil
import signal
import socket
import socketserver
import stat
import struct
import subprocess
import sys
import threading
import time
import traceback
import urllib.parse
from typing import (Any, Callable, Deque, Dict, FrozenSet, Iterable, Iterator, List, Mapping, NamedTuple, Optional,
                    Sequence, Set, TextIO, Tuple, Type, Union)

__version__ = '1.0.0'

POSIX = os.name == 'posix'
LINUX = sys.platform == 'linux'


# ---------------------------------------------------------------------------------------------
# Errors

STATUS_OF = {
    'bad_request': 400, 'invalid_api_key': 401, 'host_not_allowed': 403, 'origin_not_allowed': 403, 'not_found': 404,
    'method_not_allowed': 405, 'request_timeout': 408, 'body_too_large': 413, 'uri_too_long': 414, 'queue_timeout': 429,
    'queue_full': 429, 'headers_too_large': 431, 'internal_error': 500, 'engine_failed': 502, 'engine_not_ready': 503,
    'shutting_down': 503, 'too_many_connections': 503}
TYPE_OF = {401: 'authentication_error', 403: 'permission_error', 429: 'rate_limit_error'}

# What the gateway answers on its own account: code -> (status, type).
ERRORS = {code: (status, TYPE_OF.get(status, 'invalid_request_error' if status < 500 else 'server_error'))
          for code, status in STATUS_OF.items()}


class GatewayError(Exception):
    """An answer of the gateway's own; `code` is a key of ERRORS, `retry_after` in seconds, `headers` are further header lines."""

    def __init__(self, code: str, message: str, retry_after: Optional[int] = None, headers: Sequence[str] = ()) -> None:
        super().__init__(message)
        self.code = code
        self.status, self.type = ERRORS[code]
        self.retry_after = retry_after
        self.headers = list(headers)

    def body(self) -> bytes:
        """In the OpenAI shape."""
        return json.dumps({'error': {'message': str(self), 'type': self.type, 'param': None, 'code': self.code}}).encode()


def shutting_down() -> GatewayError:
    return GatewayError('shutting_down', 'the gateway is shutting down; try again soon', 5)


def retry_seconds(expected: float) -> int:
    """For Retry-After: 1 to 60."""
    return max(1, min(60, math.ceil(expected)))


class ClientGone(Exception):
    """The client left, or takes no bytes. Never rendered: there is nobody to read it."""


class EngineBroke(Exception):
    """The engine died, hung up or answered garbage before a byte of its answer was passed on."""

    hung_up = False     # it may be about to die


class EngineNotAccepting(Exception):
    """The engine never had the request: it does not accept connections (yet, or any more)."""


class DiedIdle(Exception):
    """A kept connection to the engine had been closed before the request came: this was no try."""


class ConfigError(Exception):
    """The configuration is bad. `problems` are plain sentences; never reaches a client."""

    def __init__(self, problems: Sequence[str]) -> None:
        super().__init__('; '.join(problems))
        self.problems = list(problems)


class StartError(Exception):
    """The gateway cannot start: a plain sentence for a person."""


# ---------------------------------------------------------------------------------------------
# Configuration
#
# A parser takes the JSON value and returns what the program uses, or raises ValueError with
# what it expected instead. Durations become seconds; "0s" as a limit becomes infinity.

Parser = Callable[[Any], Any]
TEXT = r'[^\0]*[^\s\0][^\0]*'           # not blank
SECRET = r'[!-~]([ -~]*[!-~])?'         # can stand in a header
DURATION = r'([0-9]+\.?[0-9]*|\.[0-9]+)(ns|us|µs|ms|s|m|h)'
DURATION_UNITS = {'ns': 1e-9, 'us': 1e-6, 'µs': 1e-6, 'ms': 1e-3, 's': 1.0, 'm': 60.0, 'h': 3600.0}
SIZE_UNITS = {'': 1, 'B': 1, 'KB': 1024, 'MB': 1024 ** 2, 'GB': 1024 ** 3}


def matches(pattern: str, value: object) -> Optional[re.Match[str]]:
    return re.fullmatch(pattern, value) if isinstance(value, str) else None


def checked(is_good: Callable[[Any], object], expected: str) -> Parser:
    """A parser for values that are used as they stand."""
    def parse(value: object) -> object:
        if is_good(value):
            return value
        raise ValueError(expected)
    return parse


def listed(pattern: str, expected: str, convert: Callable[[str], str] = str) -> Parser:
    """A parser for lists of strings of one form."""
    def parse(value: object) -> Tuple[str, ...]:
        if not isinstance(value, list):
            raise ValueError(expected)
        wrong = [str(place) for place, item in enumerate(value, 1) if not matches(pattern, item)]
        if wrong:
            raise ValueError('%s; not so: item %s' % (expected, ', '.join(wrong)))
        return tuple(convert(item) for item in value)
    return parse


def host_and_port(pattern: str, expected: str) -> Parser:
    """A parser for (host, port), from the two groups of a pattern."""
    def parse(value: object) -> Tuple[str, int]:
        match = matches(pattern, value)
        if match and int(match.group(2) or 80) <= 65535:
            return match.group(1).strip('[]'), int(match.group(2) or 80)
        raise ValueError(expected)
    return parse


def parse_duration(value: Any) -> float:
    """Seconds of a duration in Go's form ("1m30s", see time.ParseDuration) or a plain number of seconds."""
    if matches('0|(%s)+' % DURATION, value):
        value = math.fsum(float(number) * DURATION_UNITS[unit] for number, unit in re.findall(DURATION, value))
    if type(value) in (int, float) and 0 <= value < math.inf:
        return float(min(value, 1e9))
    raise ValueError('a duration such as "500ms", "30s" or "1m30s", or a number of seconds')


def parse_limit(value: Any) -> float:
    """As parse_duration, where "0s", and what is longer than the system's timers run (24 days), is infinity."""
    seconds = parse_duration(value)
    return seconds if 0 < seconds < 2e6 else math.inf


def parse_size(value: Any) -> int:
    """Bytes of a size such as "64MB" (units of 1024) or a plain number of bytes."""
    match = matches(r'(?ai)(\d{1,15}(?:\.\d+)?) ?(|B|KB|MB|GB)', value)
    size = int(float(match.group(1)) * SIZE_UNITS[match.group(2).upper()]) if match else value
    if type(size) is int and size > 0:
        return size
    raise ValueError('a size such as "64MB", or a number of bytes')


def parse_pattern(value: Any) -> re.Pattern[str]:
    try:
        return re.compile(value)
    except TypeError:
        raise ValueError('a regular expression, as a string') from None
    except (re.error, OverflowError) as error:
        raise ValueError('a regular expression (%s)' % error) from None


def parse_env(value: object) -> Mapping[str, Optional[str]]:
    if isinstance(value, dict) and all(matches(r'[^=\0]+', name) and (text is None or matches(r'[^\0]*', text))
                                       for name, text in value.items()):
        return value
    raise ValueError('an object of strings, such as {"CUDA_VISIBLE_DEVICES": "0"}; null removes a variable')


def parse_api_keys(value: object) -> Dict[str, str]:
    """{name: secret}. What is wrong is said without the secrets themselves."""
    if not isinstance(value, dict):
        raise ValueError('an object of names and secrets, such as {"alice": "a long random string"}')
    keys = {name: secret for name, secret in value.items() if not name.startswith('_')}
    wrong = ['"%s"' % name for name, secret in keys.items()
             if not (name.strip() and matches(SECRET, secret)) or list(keys.values()).count(secret) > 1]
    if wrong:
        raise ValueError('for each name a secret of its own, visible ASCII characters with no blank at either end; not so: '
                         + ', '.join(wrong))
    return keys


parse_addr = host_and_port(r'(\[[\w:.%]+\]|[^\s:\[\]/]*):([0-9]{1,5})',
                           'host:port, such as "127.0.0.1:8081" or ":8081", the port from 0 to 65535')
parse_base_url = host_and_port(r'http://(\[[\w:.%]+\]|[^\s:\[\]/?#@]+)(?::(0*[1-9][0-9]{0,4}))?/?',
                               '"http://host:port", such as "http://127.0.0.1:8080", the port from 1 to 65535')
parse_origins = listed(r'\*|[A-Za-z][\w+.-]*://[^\s/?#@]+',
                       'a list of origins, such as ["https://chat.example"] (no path), or ["*"] for all', str.lower)
parse_prefixes = listed(r'(?!.*[\\?#%]|.*/\.\.?(/|$))/[!-~]*', 'a list of path prefixes, such as ["/v1/"]')
parse_args = listed(r'[^\0]*', 'a list of strings (numbers in quotes too)',
                    lambda arg: os.path.expanduser(arg) if arg.startswith('~/') else arg)
parse_bin = checked(lambda value: matches(TEXT, value), 'the path of llama-server (or start with --demo to try without one)')
parse_engine_key = checked(lambda value: value is None or matches(SECRET, value),
                           'visible ASCII characters with no blank at either end, or null')
parse_health_path = checked(lambda value: matches(r'(/[!-~]*)?', value), 'a path such as "/health", or "" for an engine that has none')
parse_log_path = checked(lambda value: value is None or matches(TEXT, value), 'a string that is not blank, or null')
parse_count = checked(lambda value: type(value) is int and value >= 1, 'a whole number of at least 1')
parse_count_or_0 = checked(lambda value: type(value) is int and value >= 0, 'a whole number of at least 0')
parse_order = checked(lambda value: value in ('fair', 'fifo'), '"fair" or "fifo"')
parse_level = checked(lambda value: value in ('debug', 'info', 'warn', 'error'), '"debug", "info", "warn" or "error"')
parse_positive = checked(lambda value: type(value) in (int, float) and 0 < value < 1e15, 'a number above 0')


def key(default: object, parse: Parser, doc: str) -> Any:
    """A configuration key as a dataclass field: its default as it would stand in the file, its parser, its meaning."""
    return dataclasses.field(metadata={'key': (default, parse, doc)})


@dataclasses.dataclass(frozen=True)
class ServerConfig:
    """The side of the clients."""
    addr: Tuple[str, int] = key(':8081', parse_addr, 'host:port to listen on; an empty host is every interface, port 0 picks one')
    api_keys: Mapping[str, str] = key({}, parse_api_keys, '{"name": "secret"}; when not empty, one is asked for')
    allowed_origins: Tuple[str, ...] = key([], parse_origins, 'browser origins that may call; ["*"] for all')
    forward: Tuple[str, ...] = key(['/v1/'], parse_prefixes, 'path prefixes that are forwarded to the engine')
    max_body: int = key('64MB', parse_size, 'largest request body')
    max_connections: int = key(512, parse_count, 'open client connections')
    read_timeout: float = key('30s', parse_limit, 'longest pause while a request is received; the whole head has this long')
    write_timeout: float = key('30s', parse_limit, 'longest a client may refuse to take bytes')
    idle_timeout: float = key('75s', parse_limit, 'longest life of a connection with no request on it')
    drain_timeout: float = key('30s', parse_limit, 'how long a stop or reload waits for requests in flight')


@dataclasses.dataclass(frozen=True)
class EngineConfig:
    """The engine: how it is started, reached and judged."""
    bin: str = key(None, parse_bin, 'path of llama-server; a bare name is looked up on PATH')
    args: Tuple[str, ...] = key([], parse_args, 'its arguments; --host and --port are added from base_url')
    env: Mapping[str, Optional[str]] = key({}, parse_env, 'added to its environment; null removes a variable')
    base_url: Tuple[str, int] = key('http://127.0.0.1:8080', parse_base_url, 'where it is reached')
    api_key: Optional[str] = key(None, parse_engine_key, "sent to the engine as its bearer key, when it has one")
    ready_pattern: re.Pattern[str] = key('listening|ready|server is running', parse_pattern,
                                         'regex over its output; counts only where there is no health_path')
    health_path: str = key('/health', parse_health_path, 'asked until it says 200; "" for an engine that has none')
    start_timeout: float = key('30s', parse_limit, 'longest time without a sign of life while starting')
    stop_timeout: float = key('10s', parse_duration, 'from the polite signal to the kill')
    restart_backoff: float = key('2s', parse_duration, 'pause before a restart; doubles with each failed start, to at most 30 s')
    hang_timeout: float = key('0s', parse_duration, 'opt-in: requests in the engine and no sign of life for this long: restart')


@dataclasses.dataclass(frozen=True)
class QueueConfig:
    """Who may go in, and who waits how long."""
    max_concurrency: int = key(1, parse_count, 'requests in the engine at once')
    wait_timeout: float = key('60s', parse_limit, 'longest wait for a slot, engine restarts included')
    max_waiting: int = key(128, parse_count_or_0, 'longest queue; the next one is refused at once; 0: no queue')
    max_bytes: int = key('512MB', parse_size, 'request bodies held at once')
    order: str = key('fair', parse_order, '"fair": in turn between clients; "fifo": strict arrival order')
    heartbeat: float = key('0s', parse_duration, 'opt-in: a waiting streaming request gets an SSE comment each such interval')


@dataclasses.dataclass(frozen=True)
class LoggerConfig:
    """Where the log goes. In the file its keys have dashes."""
    log_path: Optional[str] = key(None, parse_log_path, 'log file, in addition to stderr; null for stderr only')
    log_level: str = key('info', parse_level, 'debug, info, warn or error')
    max_size: float = key(2, parse_positive, 'MB, then the file is rotated')
    max_age: float = key(60, parse_positive, 'days, then a rotated file is deleted')


@dataclasses.dataclass(frozen=True)
class Config:
    """The whole configuration; one immutable snapshot, replaced as a whole by a reload."""
    server: ServerConfig
    engine: EngineConfig
    queue: QueueConfig
    logger: LoggerConfig


SECTIONS: Dict[str, Any] = {'server': ServerConfig, 'engine': EngineConfig, 'queue': QueueConfig, 'logger': LoggerConfig}
ConfigKey = collections.namedtuple('ConfigKey', 'path attribute default parse doc')
CONFIG_KEYS = tuple(
    ConfigKey('%s.%s' % (section, field.name.replace('_', '-') if section == 'logger' else field.name), field.name, *field.metadata['key'])
    for section, of in SECTIONS.items() for field in dataclasses.fields(of))
FROM_DEMO = ('engine.bin', 'engine.args', 'engine.base_url')    # with --demo these are the demo engine's
SECRET_NAME = r'(?i)((?:key|token|secret|passw|-hft)\w*)'
SECRET_OPTIONS = ('--api-key', '--hf-token', '-hft')


def masked(command: Sequence[str]) -> str:
    """A command line for people, its secrets masked."""
    words = ['****' if before in SECRET_OPTIONS else shlex.quote(word) for before, word in zip(['', *command], command)]
    return ' '.join(re.sub(r"(?s)'?(%s)=.*" % '|'.join(SECRET_OPTIONS), r'\1=****', word) for word in words)


def shown(value: object, name: str = '') -> str:
    """The value of a key for a message: cut short, and masked from the first name of a secret on."""
    text = '****' if re.search(SECRET_NAME, name) else json.dumps(value, ensure_ascii=False)
    text = re.sub(SECRET_NAME + r'([":=, \\]+).+', r'\1\2****', text)
    return text if len(text) <= 60 else text[:57] + '...'


class JsonObject(Dict[str, Any]):
    """A JSON object that remembers which of its keys came twice."""

    def __init__(self, pairs: List[Tuple[str, Any]]) -> None:
        super().__init__(pairs)
        self.repeated = [name for name, times in collections.Counter(name for name, _ in pairs).items() if times > 1]


def repeated_keys(value: object, path: str = '') -> Iterator[str]:
    if isinstance(value, JsonObject):
        for name in value.repeated:
            yield '%s%s: given twice; keep one' % (path, name)
        for name, inner in value.items():
            yield from repeated_keys(inner, '%s%s.' % (path, name))


def unknown_keys(given: Mapping[str, Any], known: Sequence[str], path: str = '') -> Iterator[str]:
    for name, value in given.items():
        if name not in known and not name.startswith('_'):
            elsewhere = [k.path for k in CONFIG_KEYS if k.path.endswith('.' + name)]
            near = ''.join(difflib.get_close_matches(name, known, 1) or elsewhere[:1])
            advice = 'did you mean "%s"?' % near if near else 'expected one of ' + ', '.join(known)
            yield '%s%s: unknown key (value %s); %s' % (path, name, shown(value, name + near), advice)


def parse_config(data: object, demo: bool = False) -> Config:
    """The configuration from decoded JSON, with `demo` without the keys FROM_DEMO. Raises ConfigError with every mistake at once."""
    if not isinstance(data, dict):
        raise ConfigError(['the configuration is %s; expected a JSON object' % shown(data)])
    problems = [*repeated_keys(data), *unknown_keys(data, list(SECTIONS))]
    values: Dict[str, Dict[str, Any]] = {section: {} for section in SECTIONS}
    for section in SECTIONS:
        given = data.get(section, {})
        if not isinstance(given, dict):
            problems.append('%s: %s; expected an object' % (section, shown(given)))
            continue
        keys = {k.path.partition('.')[2]: k for k in CONFIG_KEYS if k.path.startswith(section + '.')}
        problems += unknown_keys(given, list(keys), section + '.')
        for name, k in keys.items():
            try:
                values[section][k.attribute] = None if demo and k.path in FROM_DEMO else k.parse(given.get(name, k.default))
            except ValueError as error:
                problems.append('%s: %s; expected %s' % (k.path, shown(given[name], name) if name in given else 'missing', error))
    most, body = values['queue'].get('max_bytes', math.inf), values['server'].get('max_body', 0)
    if most < body:
        problems.append('queue.max_bytes: %d; expected at least server.max_body, which is %d' % (most, body))
    if problems:
        raise ConfigError(problems)
    return Config(**{section: of(**values[section]) for section, of in SECTIONS.items()})


def load_config(path: str, demo: bool = False) -> Config:
    """Reads and checks a configuration file. Raises ConfigError with every mistake at once."""
    try:
        with open(path, encoding='utf-8-sig') as file:
            return parse_config(json.load(file, object_pairs_hook=JsonObject), demo)
    except ConfigError as error:
        problems = error.problems
    except OSError as error:
        problems = ['cannot be read: %s; name another file with --config, or try --demo' % error.strerror]
    except json.JSONDecodeError as error:
        problems = ['JSON syntax error at line %d, column %d: %s' % (error.lineno, error.colno, error.msg)]
    except (ValueError, RecursionError) as error:       # not UTF-8, thousands of digits, nested too deeply
        problems = ['cannot be read: %s; it has to be JSON in UTF-8' % error]
    raise ConfigError(['%s: %s' % (path, problem) for problem in problems])


def argument_of(args: Sequence[str], *names: str) -> Optional[str]:
    """The value of the last of these options, as `--option value` or `--option=value`; None where there is none."""
    parts = [part for arg in args for part in (arg.split('=', 1) if arg.startswith('-') else [arg])]
    values = [value for name, value in zip(parts, parts[1:]) if name in names]
    return values[-1] if values else None


def config_warnings(config: Config) -> List[str]:
    """What is allowed but probably not meant, in plain sentences."""
    found = []
    host = config.server.addr[0]
    if not config.server.api_keys and not re.fullmatch(r'localhost|127\.[0-9.]+|::1', host):
        found.append('server.addr is %s and server.api_keys is empty: everybody who reaches this machine can use the model'
                     % (host or 'every interface'))
    if argument_of(config.engine.args, '--api-key') and not config.engine.api_key:
        found.append('engine.args has --api-key but engine.api_key is not set: the engine will refuse what is forwarded')
    slots = argument_of(config.engine.args, '-np', '--parallel') or ''
    if re.fullmatch('[0-9]{1,9}', slots) and 0 < int(slots) < config.queue.max_concurrency:
        found.append('queue.max_concurrency is %d but engine.args gives the engine only %s slots: the rest waits inside the engine'
                     % (config.queue.max_concurrency, slots))
    return found


def bracketed(host: str, port: int) -> str:
    """host:port as it stands in a URL."""
    return '%s:%d' % ('[%s]' % host if ':' in host else host, port)


def engine_command(config: EngineConfig) -> List[str]:
    """The command line the engine is started with. Raises ConfigError where something it names is not there."""
    problems = []
    name = os.path.expanduser(config.bin)
    found = shutil.which(name, path=config.env.get('PATH') or None)
    if found is None:
        problems.append('engine.bin: %s %s; install llama.cpp (or copy its llama-server here) and name it there, '
                        'or start with --demo to try the gateway without one'
                        % (shown(config.bin), 'is not an executable file' if os.path.exists(name) else 'is not there'))
    host, port = config.base_url[0], str(config.base_url[1])
    if os.path.basename(name).lower() in ('llama-server', 'llama-server.exe'):
        model = argument_of(config.args, '-m', '--model')
        if model is not None and not os.path.exists(model):
            problems.append('engine.args: the model file %s is not there; put the path of a .gguf file after -m, '
                            'or start with --demo to try the gateway without a model' % shown(model))
        given = argument_of(config.args, '--port') or port
        if given != port:
            problems.append('engine.args: --port %s contradicts engine.base_url, which says port %s; leave --port out'
                            % (shown(given), port))
    if problems:
        raise ConfigError(problems)
    added = [(option, value) for option, value in (('--host', host), ('--port', port)) if argument_of(config.args, option) is None]
    return [os.path.abspath(found or name), *config.args, *itertools.chain(*added)]


# ---------------------------------------------------------------------------------------------
# Logging
#
# Not the logging module: with two handlers it costs 30 us a line, this 5, and there is a line a
# request. Its thread writes it; among many requests they are written some together (see Log.line).

LEVELS = ('debug', 'info', 'warn', 'error')
DEBUG, INFO, WARN, ERROR = range(len(LEVELS))
PLAIN_WORD = re.compile(r'[!#-<>-~]+')      # visible ASCII without the quote and the equals sign
ESCAPES = {'"': '\\"', '\\': '\\\\', '\n': '\\n', '\r': '\\r', '\t': '\\t'}
PIPE_BUF = 4096         # bytes; what a pipe has room for where poll says it takes some


def escaped(char: str) -> str:
    """A character as it stands within quotes in Go."""
    if char.isprintable() and char not in ESCAPES:
        return char
    return ESCAPES.get(char) or ('\\x%02x' if char <= '\x7f' else '\\u%04x' if char <= '\uffff' else '\\U%08x') % ord(char)


def logfmt(fields: Mapping[str, object]) -> str:
    """`name=value` pairs as Go's slog text handler writes them: what is not one plain word is quoted and escaped."""
    pairs = []
    for name, value in fields.items():
        if type(value) not in (int, float):
            text = 'null' if value is None else str(value)
            value = text if PLAIN_WORD.fullmatch(text) else '"%s"' % ''.join(map(escaped, text))
        pairs.append('%s=%s' % (name, value))
    return ' '.join(pairs)


@functools.lru_cache(maxsize=1)
def _time_pattern(second: int) -> str:
    text = time.strftime('%Y-%m-%dT%H:%M:%S.%%03d%z', time.localtime(second))
    return text[:-2] + ':' + text[-2:]


def log_time(seconds: float) -> str:
    """A time (seconds since 1970) as it stands in the log."""
    return _time_pattern(int(seconds)) % (seconds % 1 * 1000)


def write_now(fd: int, data: bytes) -> None:
    """Raises OSError. A pipe that nobody reads blocks, it does not fail: so it is asked first."""
    if POSIX:
        asked = select.poll()
        asked.register(fd, select.POLLOUT)
        if not any(event & select.POLLOUT for _, event in asked.poll(0)):
            raise BlockingIOError('nobody reads it')
    os.write(fd, data if len(data) <= PIPE_BUF else data[:PIPE_BUF - 4] + b'...\n')


def say(text: str, file: Optional[TextIO] = None) -> None:
    """Plain sentences for the person at the terminal, on stdout or `file`."""
    file = file or sys.stdout
    if file is not None:
        with contextlib.suppress(OSError):      # nobody reads them
            for line in text.split('\n'):
                write_now(file.fileno(), (line + '\n').encode('utf-8', 'backslashreplace'))


class LogFile:
    """The log file: appended to, and rotated to NAME-<UTC time>.EXT beside it.

    Whatever it opens, its descriptor keeps its number: that of a closed one is soon a client's,
    and somebody may be about to write to it.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()       # held while the file is changed for another
        self._fd = os.open(os.devnull, os.O_WRONLY)

    def open(self, path: str, max_bytes: float, max_age: float) -> None:
        """`max_age` in seconds. Raises OSError; then nothing has changed."""
        with self._lock:
            self._change_to(os.path.abspath(os.path.expanduser(path)))
            self._max_bytes, self._max_age = max_bytes, max_age
            self._delete_old()

    def _change_to(self, path: str) -> None:
        fd = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o640)
        os.dup2(fd, self._fd, inheritable=False)
        os.close(fd)
        self._path, self._size = path, os.fstat(self._fd).st_size

    def write(self, data: bytes) -> None:
        """Raises OSError."""
        if self._size + len(data) > self._max_bytes:
            self._rotate()
        self._size += os.write(self._fd, data)      # to the end, whoever else writes: O_APPEND

    def _rotate(self) -> None:
        with self._lock:
            self._size = os.fstat(self._fd).st_size
            if self._size <= self._max_bytes / 2:
                return      # another thread was first, or it is a device
            self._size = 0  # if it fails now, it is tried again when as much has been written once more
            stem, extension = os.path.splitext(self._path)
            now = time.time()
            os.rename(self._path, '%s-%s.%06d%s' % (stem, time.strftime('%Y%m%dT%H%M%S', time.gmtime(now)), now % 1 * 1e6, extension))
            self._change_to(self._path)
            self._delete_old()

    def _delete_old(self) -> None:
        stem, extension = os.path.splitext(os.path.basename(self._path))
        rotated = re.compile(re.escape(stem) + r'-\d{8}T\d{6}(\.\d+)?' + re.escape(extension))
        with contextlib.suppress(OSError):
            for entry in os.scandir(os.path.dirname(self._path)):
                if rotated.fullmatch(entry.name) and entry.stat().st_mtime < time.time() - self._max_age:
                    os.unlink(entry.path)


class Sink:
    """Where lines go. What is not taken is dropped and counted, and stops nothing."""

    def __init__(self, name: str, put: Callable[[bytes], object]) -> None:
        self._name, self._put, self._dropped = name, put, 0

    def write(self, lines: bytes) -> None:
        try:
            if self._dropped:
                self._put(b'level=WARN msg="log lines dropped" count=%d\n' % self._dropped)
                self._dropped = 0
            self._put(lines)
        except OSError as error:
            if not self._dropped:
                say('gollama: %s cannot be written, going on without it: %s' % (self._name, error), sys.stderr)
            self._dropped += lines.count(b'\n')


class Log:
    """`key=value` lines on stderr and in a file."""

    TOGETHER = 0.05     # seconds; lines that can wait are written so often

    def __init__(self) -> None:
        self._level = INFO
        self._file: Optional[LogFile] = None
        self._sinks: List[Sink] = []        # replaced as a whole
        self._pending: Deque[bytes] = collections.deque(maxlen=10000)      # its own operations are atomic
        self._writing = threading.Lock()    # held by who writes them: two could find room in a pipe where there is room for one
        self._flushed = 0.0                 # when last, seconds since 1970

    def configure(self, config: LoggerConfig) -> None:
        """Opens the file (anew, so that a reload follows a moved one). Raises OSError; then nothing has changed."""
        sinks = []
        if sys.stderr is not None:
            fd = sys.stderr.fileno()        # a file takes everything, and need not be asked
            sinks.append(Sink('stderr', functools.partial(os.write if stat.S_ISREG(os.fstat(fd).st_mode) else write_now, fd)))
        if config.log_path or self._file:
            self._file = self._file or LogFile()
            self._file.open(config.log_path or os.devnull, config.max_size * 1024 ** 2, config.max_age * 86400)
            sinks.append(Sink('the log file', self._file.write))
        self._level, self._sinks = LEVELS.index(config.log_level), sinks

    def line(self, level: int, pairs: str, can_wait: bool = False) -> None:
        """`pairs` are as `logfmt` makes them. One that can wait does so for the next line, or for `flush`.

        Each write gives the interpreter lock away, and among eight clients winning it back costs
        more than the write: a line a request, at once, took a quarter of the requests per second.
        """
        if level >= self._level:
            now = time.time()
            self._pending.append(('time=%s level=%s %s\n' % (log_time(now), LEVELS[level].upper(), pairs)).encode('utf-8', 'backslashreplace'))
            if not can_wait or now - self._flushed > self.TOGETHER:
                self._flushed = now
                self.flush()

    def flush(self, patience: float = 0.0) -> None:
        """Writes what waits; where another thread is at it, that one does (`patience`: seconds to wait for it)."""
        while self._pending and self._writing.acquire(timeout=patience):
            try:
                self._write_pending()
            finally:
                self._writing.release()

    def _write_pending(self) -> None:
        """Whole lines, as many together as a pipe takes."""
        block = b''
        while self._pending:
            line = self._pending.popleft()
            if block and len(block) + len(line) > PIPE_BUF:
                self._write(block)
                block = b''
            block += line
        self._write(block)

    def _write(self, lines: bytes) -> None:
        for sink in self._sinks:
            sink.write(lines)

    def event(self, level: int, message: str, fields: Mapping[str, object]) -> None:
        """One event is one line, whatever a client or the engine sends."""
        if level >= self._level:
            self.line(level, logfmt({'msg': message, **fields}))

    def info(self, message: str, **fields: object) -> None:
        self.event(INFO, message, fields)

    def warn(self, message: str, **fields: object) -> None:
        self.event(WARN, message, fields)

    def error(self, message: str, **fields: object) -> None:
        self.event(ERROR, message, fields)

    def exception(self, message: str, **fields: object) -> None:
        """An error with the traceback of the exception that is being handled."""
        self.error(message, **fields, traceback=traceback.format_exc())


log = Log()


# ---------------------------------------------------------------------------------------------
# Time


class Deadline:
    """A point on the monotonic clock, `seconds` from now; passed along, so that waits add up to one limit."""

    __slots__ = ('_end',)

    def __init__(self, seconds: float) -> None:
        self._end = time.monotonic() + seconds

    def remaining(self) -> float:
        """Seconds left, at least 0; may be infinite."""
        return max(0.0, self._end - time.monotonic())

    @property
    def expired(self) -> bool:
        return time.monotonic() >= self._end


class Backoff:
    """Pauses before restarts: `base` seconds, doubled for each start in a row that never became ready."""

    LONGEST = 30.0
    LEAST_AFTER_FAILURE = 0.1       # whatever `base` is

    def __init__(self, base: float) -> None:
        self._base, self._failed = base, 0

    def failed(self) -> None:
        self._failed += 1

    def succeeded(self) -> None:
        self._failed = 0

    def pause(self) -> float:
        """Seconds to wait before the next start."""
        pause = min(self._base * 2.0 ** min(self._failed, 30), max(self._base, self.LONGEST))
        return max(pause, self.LEAST_AFTER_FAILURE) if self._failed else pause


# ---------------------------------------------------------------------------------------------
# Engine process

LINE_LIMIT = 4096       # bytes of one line of the engine's output; a longer one is several
TAIL_LINES = 100        # kept in memory
PROBE_TIMEOUT = 5.0     # seconds; loopback: an engine that takes longer to say "loading" is not well
EXIT_MESSAGES = {126: ' (it cannot be executed)', 127: ' (it, or what it needs, was not found)'}
SIGKILL = getattr(signal, 'SIGKILL', signal.SIGTERM)
OWN_GROUP: Dict[str, Any] = {'start_new_session': True} if POSIX else {'creationflags': getattr(subprocess, 'CREATE_NEW_PROCESS_GROUP', 0)}


def exit_phrase(code: int) -> str:
    """How a process ended, for people: a Popen.returncode in words."""
    if code >= 0:
        return 'exit status %d%s' % (code, EXIT_MESSAGES.get(code, ''))
    names = {number.value: ' (%s)' % number.name for number in signal.Signals}
    return 'signal %d%s' % (-code, names.get(-code, ''))


def port_problem(host: str, port: int) -> Optional[str]:
    """What is in the way on the engine's port, asked by connecting and by binding; None where it is free."""
    name = bracketed(host, port)
    try:
        addresses = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError) as error:
        return '%s leads nowhere: %s; put an address of this machine into engine.base_url' % (name, error)
    for family, kind, proto, _, address in addresses:
        with contextlib.suppress(OSError), socket.socket(family, kind, proto) as probe:
            probe.settimeout(1)
            probe.connect(address)
            return ('%s is already taken: something answers there, perhaps an engine left over from an earlier run; '
                    'end it, or choose another port in engine.base_url' % name)
        try:
            with socket.socket(family, kind, proto) as probe:
                if POSIX:   # elsewhere this option means "share the port"
                    probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                probe.bind(address)
        except OSError as error:
            if error.errno in (errno.EADDRINUSE, errno.EACCES):
                return '%s cannot be used by the engine: %s; choose another port in engine.base_url' % (name, error.strerror)
    return None


class OutputPump(threading.Thread):
    """Drains the engine's output, whatever comes, and hands on lines. A grandchild can hold the pipe open for ever: hence `stop`."""

    LINES = re.compile(rb'[^\r\n]{1,%d}' % LINE_LIMIT)

    def __init__(self, pipe: Any, on_line: Callable[[str], None]) -> None:
        super().__init__(name='output-pump', daemon=True)
        self._pipe, self._on_line = pipe, on_line
        self._stopper, self._stopped = socket.socketpair()
        self.start()

    def stop(self, grace: float) -> None:
        """Gives it `grace` seconds for what is still in the pipe."""
        self.join(grace)
        self._stopper.close()

    def run(self) -> None:
        rest, data = b'', b'\n'
        with self._pipe, self._stopped:
            while data:
                data = self._read()
                lines = self.LINES.findall(rest + data)
                rest = lines.pop() if data and data[-1:] not in b'\r\n' else b''
                for line in filter(bytes.strip, lines):
                    self._on_line(line.decode('utf-8', 'replace').strip())

    def _read(self) -> bytes:
        """Some output; b'' at its end, or where it was stopped and nothing is left."""
        if POSIX:       # elsewhere there is no asking a pipe
            either = select.poll()
            either.register(self._pipe, select.POLLIN)
            either.register(self._stopped, select.POLLIN)
            if self._pipe.fileno() not in dict(either.poll()):
                return b''
        return os.read(self._pipe.fileno(), 65536)


class EngineProcess:
    """One life of the engine, in a process group (and session) of its own.

    Nothing of the group is left after the leader's end, nor, on POSIX, after the gateway is
    killed: the guard, a shell that reads a pipe from the gateway, sees end-of-file and kills
    the group. There is no moment without it: the engine is started through a shell that waits
    for a word on its stdin before it becomes the engine, and that word comes after the guard.
    """

    SHIM = ('/bin/sh', '-c', 'read -r go && exec "$@" </dev/null', 'sh')
    GUARD = ('/bin/sh', '-c', 'trap "" TERM INT HUP; read -r never; kill -9 -"$0"')     # with `kill -9 -- -N` dash refuses

    def __init__(self, config: EngineConfig, on_news: Callable[[], None]) -> None:
        self._config = config
        self._on_news = on_news
        self.started = self.last_output = time.monotonic()
        self.saw_ready_line = False
        self.exited = threading.Event()
        self.exit_phrase: Optional[str] = None
        self._tail: Deque[str] = collections.deque(maxlen=TAIL_LINES)
        # Held between "is it reaped?" and a signal: a reaped pid may belong to somebody else.
        self._signal_lock = threading.Lock()
        self._reaped = False
        self._process: subprocess.Popen[bytes]
        self._guard: Optional[subprocess.Popen[bytes]] = None

    @property
    def pid(self) -> int:
        return self._process.pid

    def start(self) -> None:
        """Raises OSError or RuntimeError where the system gives no process, pipe or thread."""
        # The gateway speaks to systemd, the engine does not.
        wanted: Dict[str, Optional[str]] = {**os.environ, 'NOTIFY_SOCKET': None, **self._config.env}
        self._process = subprocess.Popen(
            [*(self.SHIM if POSIX else ()), *engine_command(self._config)], bufsize=0, **OWN_GROUP,
            env={name: value for name, value in wanted.items() if value is not None},
            stdin=subprocess.PIPE if POSIX else subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
        try:
            self._begin()
        except BaseException:       # no second process, or no thread, is to be had
            self.kill()
            with self._process:
                self._reaped = True
            self._end_guard()
            raise

    def _begin(self) -> None:
        if self._process.stdin:
            with contextlib.suppress(BrokenPipeError), self._process.stdin as shim:     # closed without a word, the shim ends
                self._guard = subprocess.Popen([*self.GUARD, str(self.pid)], stdin=subprocess.PIPE, stdout=subprocess.DEVNULL,
                                               stderr=subprocess.DEVNULL, bufsize=0, **OWN_GROUP)
                shim.write(b'go\n')
        pump = OutputPump(self._process.stdout, self._on_line)
        threading.Thread(target=self._reap, args=(pump,), name='reaper', daemon=True).start()

    def _end_guard(self) -> None:
        if self._guard:
            with self._guard:
                self._guard.kill()

    def _on_line(self, line: str) -> None:
        self.last_output = time.monotonic()
        self._tail.append(line)
        self.saw_ready_line = self.saw_ready_line or bool(self._config.ready_pattern.search(line))
        log.event(DEBUG, 'engine', {'line': line[:LINE_LIMIT // 2]})

    def _reap(self, pump: OutputPump) -> None:
        if hasattr(os, 'waitid'):
            os.waitid(os.P_PID, self.pid, os.WEXITED | os.WNOWAIT)      # still a zombie: its pid is its own
        else:
            self._process.wait()
        self.kill()     # what is left of the group
        with self._signal_lock:
            self._process.wait()
            self._reaped = True
        self._end_guard()
        pump.stop(grace=0.3)    # so that the last lines are in the tail
        self.exit_phrase = exit_phrase(self._process.returncode)
        self.exited.set()
        self._on_news()

    def _signal_group(self, signum: int) -> None:
        with self._signal_lock, contextlib.suppress(OSError):       # nobody may be left
            if POSIX and not self._reaped:
                os.killpg(self.pid, signum)
            elif not self._reaped:
                self._process.terminate()

    def kill(self) -> None:
        self._signal_group(SIGKILL)

    def terminate(self, grace: float) -> None:
        """SIGTERM to the group, `grace` seconds or the leader's end, SIGKILL to the group."""
        if grace:
            self._signal_group(signal.SIGTERM)
            self.exited.wait(grace)
        self.kill()
        self.exited.wait(10)

    def tail(self, count: int) -> List[str]:
        return list(self._tail)[-count:]

    def ask(self, path: str) -> Tuple[Optional[int], bytes]:
        """(status, body) of a GET; (None, b'') where nothing answers."""
        headers = {'Authorization': 'Bearer ' + self._config.api_key} if self._config.api_key else {}
        with contextlib.closing(http.client.HTTPConnection(*self._config.base_url, timeout=PROBE_TIMEOUT)) as connection:
            try:
                connection.request('GET', path, headers=headers)
                response = connection.getresponse()
                return response.status, response.read(1 << 20)
            except (OSError, http.client.HTTPException):
                return None, b''


# ---------------------------------------------------------------------------------------------
# Watchdog


class EngineState(enum.Enum):
    """Where the engine is in its life."""
    STARTING, READY, DIED, HUNG, BACKOFF, STOPPING = 'starting', 'ready', 'died', 'hung', 'backoff', 'stopping'


TRANSITIONS: Mapping[EngineState, Set[EngineState]] = {
    EngineState.STARTING: {EngineState.READY, EngineState.DIED, EngineState.STOPPING},
    EngineState.READY: {EngineState.DIED, EngineState.HUNG, EngineState.STOPPING},
    EngineState.DIED: {EngineState.BACKOFF, EngineState.STOPPING},
    EngineState.HUNG: {EngineState.BACKOFF},
    EngineState.BACKOFF: {EngineState.STARTING, EngineState.STOPPING},
    EngineState.STOPPING: {EngineState.STARTING}}       # only for a reload


class TryKind(enum.Enum):
    """Why somebody wants to go in: who may is decided in TryGate._entered."""
    LIGHT = 'GET or HEAD'
    FIRST = 'first try of a POST'
    SECOND = 'second try'


class Waiter:
    """What the gate needs to know of a request: how to make it wait, wake it and break it off."""

    __slots__ = ('held_up', 'cut')
    held_up: bool               # its own client takes no bytes
    cut: Optional[str]          # the error code, where it was broken off
    def rearm(self) -> None: ...
    def wait(self, deadline: Deadline) -> None: ...
    def wake(self) -> None: ...
    def break_off(self, code: str) -> None: ...


class TryGate:
    """Says when a try on the engine may start, and knows which are in the engine.

    A try: `enter` (waits), the exchange with the engine, `leave`. One that broke is tried again
    within `second_try`: those go one at a time, and while there are any no first try of a POST
    starts: a prompt that kills engines takes nobody with it.
    """

    DEATH_SHOWS_WITHIN = 0.5    # seconds; the connection breaks before the reaper knows

    def __init__(self, on_empty: Callable[[], None], not_ready: Callable[[], GatewayError]) -> None:
        self._on_empty = on_empty                   # told when the last try leaves a gate that is shut
        self.not_ready = not_ready                  # what is said at a deadline
        # _lock guards all below.
        self._lock = threading.Lock()
        self._waiting: Set[Waiter] = set()          # to be woken when anything here changes
        self._engaged: Set[Waiter] = set()          # tries in the engine
        self._engaged_since = 0.0
        self._replays: Deque[Waiter] = collections.deque()      # second tries; the first one has its turn
        self._closed = False
        self.is_open = False                        # the engine is ready
        self.generation = 0                         # of the engine that is ready, or was last

    def enter(self, exchange: Waiter, deadline: Deadline, kind: TryKind) -> int:
        """Waits until a try may start, and counts it as in the engine of the returned generation. Raises GatewayError (503, 429)."""
        generation = self._wait(exchange, deadline, lambda: self._entered(exchange, kind))
        if generation:
            return generation
        if self.is_open:
            raise GatewayError('queue_timeout', 'waited too long: requests that an engine died of are tried again first', 10)
        raise self.not_ready()

    def _entered(self, exchange: Waiter, kind: TryKind) -> int:
        if self._closed:
            raise shutting_down()
        its_turn = self._replays[0] is exchange if kind is TryKind.SECOND else kind is TryKind.LIGHT or not self._replays
        if not (self.is_open and its_turn):
            return 0
        if all(other.held_up for other in self._engaged):
            self._engaged_since = time.monotonic()
        self._engaged.add(exchange)
        exchange.cut = None     # of an engine before this one
        return self.generation

    def _wait(self, exchange: Waiter, deadline: Deadline, over: Callable[[], int]) -> int:
        """Until `over()`, which is asked under the lock, is true, and returns that; 0 at the deadline."""
        while True:
            with self._lock:
                found = over()
                if found or deadline.expired:
                    return found
                exchange.rearm()
                self._waiting.add(exchange)
            try:
                exchange.wait(deadline)
            finally:
                self._waiting.discard(exchange)

    def leave(self, exchange: Waiter) -> None:
        """The try is over."""
        with self._lock:
            self._engaged.discard(exchange)
            waited_for = not self.is_open and not self._engaged
        if waited_for:
            self._on_empty()

    def await_death(self, exchange: Waiter) -> None:
        """After a connection broke: gives the engine's death a moment to show."""
        generation = self.generation
        self._wait(exchange, Deadline(self.DEATH_SHOWS_WITHIN), lambda: not self.is_open or self.generation != generation)

    @contextlib.contextmanager
    def second_try(self, exchange: Waiter, dying: bool = True) -> Iterator[None]:
        """Waits for its turn; until the end of the block no first try of a POST starts. Those before it have deadlines of their own."""
        with self._lock:
            self._replays.append(exchange)
        try:
            if dying:
                self.await_death(exchange)
            self._wait(exchange, Deadline(math.inf), lambda: self._replays[0] is exchange or self._closed)
            yield
        finally:
            with self._change():
                self._replays.remove(exchange)

    @contextlib.contextmanager
    def _change(self) -> Iterator[None]:
        """Something that others wait for is changed under the lock; they are woken after it."""
        with self._lock:
            yield
            waiting = list(self._waiting)
        for exchange in waiting:
            exchange.wake()

    def open(self) -> None:
        """A new engine is ready."""
        with self._change():
            self.is_open, self.generation = True, self.generation + 1

    def shut(self) -> None:
        """No try starts until it is opened again."""
        with self._change():
            self.is_open = False

    def close(self) -> None:
        """No try starts any more; those who wait are refused."""
        with self._change():
            self._closed = True

    @property
    def is_empty(self) -> bool:
        return not self._engaged

    def break_off(self, code: str) -> None:
        """Ends the tries in the engine."""
        with self._lock:
            engaged = list(self._engaged)
        for exchange in engaged:
            exchange.break_off(code)

    def waited_for_since(self) -> float:
        """Since when somebody waits for the engine (monotonic; now: nobody), other than those whose own client takes no bytes."""
        with self._lock:
            if all(exchange.held_up for exchange in self._engaged):
                self._engaged_since = time.monotonic()
            return self._engaged_since


class WatchdogListener:
    """What the watchdog tells others, from its own thread."""

    def engine_changed(self, state: EngineState, detail: str) -> None: ...
    def sign_of_life(self) -> None: ...
    def engine_failed_to_start(self, message: str) -> None: ...
    def watchdog_ended(self) -> None: ...


class Watchdog(threading.Thread):
    """Keeps one engine running: start, readiness, death, backoff; `gate` says when a try on it may start."""

    LONGEST_PROBE_PAUSE = 0.25      # seconds; it begins with 20 ms

    def __init__(self, config: EngineConfig, drain_timeout: float, listener: WatchdogListener) -> None:
        super().__init__(name='watchdog', daemon=True)
        self._listener = listener
        self._news = threading.Event()              # something for the watchdog's thread to look at
        self.gate = TryGate(self._news.set, self.not_ready)
        self.ended = threading.Event()
        # Written by others.
        self._wanted = config                       # a reload waits as long as this is not `config`
        self._drain_timeout = drain_timeout
        self._stopping = False
        self._at_once = False                       # the stop shall not be polite
        self._last_answer = 0.0                     # monotonic time of the last byte of any answer
        # Written by the watchdog's thread alone.
        self.config = config                        # of the engine that runs
        self._state = EngineState.STARTING
        self._since = time.monotonic()
        self._process: Optional[EngineProcess] = None
        self._backoff = Backoff(config.restart_backoff)
        self._starts = 0
        self._ready_seconds: Optional[float] = None     # None: it was never ready
        self._last_exit: Optional[str] = None

    # -- for the threads of requests

    @property
    def ready(self) -> bool:
        return self._state is EngineState.READY

    def not_ready(self) -> GatewayError:
        last = ', last exit: %s' % self._last_exit if self._last_exit else ''
        return GatewayError('engine_not_ready', 'the engine did not become ready in time (state: %s%s); try again later'
                            % (self._state.value, last), retry_seconds(self._ready_seconds or 5))

    def heard_answer(self) -> None:
        """A byte of some answer came that is more than an SSE comment."""
        self._last_answer = time.monotonic()

    # -- for the gateway

    def stop(self, kill: bool = False) -> None:
        """Stops the engine: what is in flight is closed first, since llama-server waits for its clients."""
        self.gate.close()
        self._at_once = self._at_once or kill
        self._stopping = True
        self._news.set()
        process = self._process
        if kill and process is not None:
            process.kill()

    def reconfigure(self, config: EngineConfig, drain_timeout: float) -> bool:
        """Takes a new section; the engine is restarted if it changed. Returns whether it did."""
        self._drain_timeout = drain_timeout
        if config == self._wanted:
            return False
        self.gate.shut()        # new requests wait for the new engine (first: afterwards this could be its gate already)
        self._wanted = config
        self._news.set()
        return True

    def status(self) -> Dict[str, Any]:
        process, state = self._process, self._state
        return {'state': state.value, 'state_seconds': round(time.monotonic() - self._since, 3),
                'pid': process.pid if process and state in (EngineState.STARTING, EngineState.READY) else None,
                'restarts': max(0, self._starts - 1), 'ready_seconds': self._ready_seconds, 'last_exit': self._last_exit,
                'output': [line[:500] for line in process.tail(20)] if process else []}

    def slots(self) -> Optional[int]:
        """How many requests the engine works on at once, as llama-server's /props says; None where it does not."""
        process = self._process
        try:
            slots = json.loads(process.ask('/props')[1])['total_slots'] if process else None
        except (ValueError, KeyError, TypeError, RecursionError):
            return None
        return slots if isinstance(slots, int) else None

    # -- the watchdog's own thread

    def run(self) -> None:
        try:
            while not self._stopping:
                self._one_life()
        except StartError as error:
            self._change_state(EngineState.STOPPING, str(error))
            self._listener.engine_failed_to_start(str(error))
        except Exception as error:
            log.exception('internal error in the watchdog')
            self._listener.engine_failed_to_start('internal error in the watchdog: %r' % error)
        finally:
            if self._process:
                self._process.kill()
            self.ended.set()
            self._listener.watchdog_ended()

    def _one_life(self) -> None:
        """From a start to the next pause. Raises StartError where the first start of all fails."""
        if self._wanted is not self.config:
            self.config = self._wanted
            self._backoff = Backoff(self.config.restart_backoff)
        try:
            process = self._start_engine()
            end, why = self._await_end(process) if self._await_ready(process) else (EngineState.STOPPING, '')
        except StartError as error:
            self._backoff.failed()
            last_words = self._process.tail(10) or ['(nothing)'] if self._process else []
            end, why = EngineState.DIED, '\n    '.join(['%s; its last output:' % error if last_words else str(error), *last_words])
        if end is EngineState.STOPPING:
            return self._stop_engine()
        self._end_life(end, why)
        if self._ready_seconds is None:
            raise StartError(why)
        self._pause()

    def _start_engine(self) -> EngineProcess:
        if self._state is not EngineState.STARTING:
            self._change_state(EngineState.STARTING)
        self._starts += 1
        self._process = None
        problem = port_problem(*self.config.base_url)
        if problem:
            raise StartError('the engine cannot start: %s' % problem)
        process = EngineProcess(self.config, self._news.set)
        try:
            process.start()
        except (OSError, RuntimeError, ConfigError) as error:
            raise StartError('the engine cannot start: %s' % error) from None
        self._process = process
        log.info('engine starting', pid=process.pid, command=masked(engine_command(self.config)))
        self._listener.engine_changed(EngineState.STARTING, 'pid %d' % process.pid)
        return process

    def _await_ready(self, process: EngineProcess) -> bool:
        """Until the engine is ready: True; False where a stop or reload came. Raises StartError otherwise."""
        pause, heard = 0.0, process.started
        while not self._interrupted():
            if process.exited.is_set():
                raise StartError('the engine ended before it was ready: %s' % process.exit_phrase)
            status = process.ask(self.config.health_path)[0] if self.config.health_path else 404
            if process.exited.is_set():
                continue        # whoever answered, it was not our child
            if status == 200 or status == 404 and process.saw_ready_line:
                self._became_ready(process)
                return True
            last = max(process.last_output, time.monotonic() if status == 503 else 0.0)
            if last > heard:
                heard = last
                self._listener.sign_of_life()
            if time.monotonic() - heard > self.config.start_timeout:
                raise StartError('the engine gave no sign of life for %g s while starting (engine.start_timeout): %s'
                                 % (self.config.start_timeout, self._what_was_missing(status)))
            self._rest(pause)
            pause = min(self.LONGEST_PROBE_PAUSE, max(0.02, pause * 1.5))
        return False

    def _what_was_missing(self, status: Optional[int]) -> str:
        where = 'http://%s%s' % (bracketed(*self.config.base_url), self.config.health_path)
        if status is None:
            return 'nothing answers at %s; check the port in engine.args and engine.base_url' % where
        if status in (401, 403):
            return '%s says %d; put the key of --api-key into engine.api_key' % (where, status)
        if status == 404:
            return 'no line of its output matched engine.ready_pattern (%s), and it has no health path' % self.config.ready_pattern.pattern
        return '%s says %d instead of 200' % (where, status)

    def _became_ready(self, process: EngineProcess) -> None:
        process.saw_ready_line = True       # ends the matching
        self._backoff.succeeded()
        self._ready_seconds = round(time.monotonic() - process.started, 3)
        self._change_state(EngineState.READY, '%.1f' % self._ready_seconds, pid=process.pid, seconds=self._ready_seconds)

    def _interrupted(self) -> bool:
        return self._stopping or self._wanted is not self.config

    def _rest(self, seconds: float) -> None:
        """Until there is news, at most so long."""
        self._news.wait(min(seconds, threading.TIMEOUT_MAX))
        self._news.clear()

    def _await_end(self, process: EngineProcess) -> Tuple[EngineState, str]:
        """How the life of a ready engine ends: the next state, and why."""
        hang_timeout = self.config.hang_timeout or math.inf
        drained: Optional[Deadline] = None      # of a reload that waits
        while True:
            if process.exited.is_set():
                return EngineState.DIED, process.exit_phrase or ''
            if self._interrupted() and drained is None:
                self.gate.shut()        # again: it may have been opened after `reconfigure` shut it
                drained = Deadline(self._drain_timeout)
            if self._stopping or drained and (drained.expired or self.gate.is_empty):
                return EngineState.STOPPING, ''
            if time.monotonic() - max(self.gate.waited_for_since(), self._last_answer, process.last_output) > hang_timeout:
                log.error('engine hung: no byte of an answer and no line of output', pid=process.pid, seconds=hang_timeout)
                return EngineState.HUNG, 'hung'
            self._rest(min(drained.remaining() if drained else math.inf, hang_timeout / 4))

    def _end_life(self, state: EngineState, why: str) -> None:
        """The engine died, hung, or did not start: nothing of it stays."""
        if self._process:
            self._process.kill()
            self._process.exited.wait(10)
            self._last_exit = self._process.exit_phrase
        self._change_state(state, why, why=why)
        self.gate.break_off('engine_failed')

    def _stop_engine(self) -> None:
        """A polite stop, for good or for a reload: what is in flight is closed first."""
        self._change_state(EngineState.STOPPING)
        self.gate.break_off('shutting_down' if self._stopping else 'engine_failed')
        if self._process:
            self._process.terminate(0.0 if self._at_once else self.config.stop_timeout)
            self._last_exit = self._process.exit_phrase
            log.info('engine stopped', pid=self._process.pid, exit=self._last_exit)

    def _pause(self) -> None:
        """The backoff; a stop or a reload ends it."""
        pause = self._backoff.pause()
        deadline = Deadline(pause)
        self._change_state(EngineState.BACKOFF, '%g' % pause, seconds=pause)
        while not self._interrupted() and not deadline.expired:
            self._rest(deadline.remaining())
        if self._stopping:
            self._change_state(EngineState.STOPPING)

    def _change_state(self, new: EngineState, detail: str = '', **fields: object) -> None:
        if new not in TRANSITIONS[self._state]:
            raise AssertionError('no transition from %s to %s' % (self._state, new))
        if self._state is EngineState.READY:
            self.gate.shut()
        self._state, self._since = new, time.monotonic()
        if new is EngineState.READY and not self._interrupted():
            self.gate.open()
        if new is not EngineState.STARTING:      # told with its pid and command once it has them
            log.event(WARN if new in (EngineState.DIED, EngineState.HUNG) else INFO, 'engine ' + new.value, fields)
            self._listener.engine_changed(new, detail)


# ---------------------------------------------------------------------------------------------
# HTTP messages: pure functions of bytes

LINE_LENGTH = 8192          # bytes of a request line or header line; nginx and llama-server have the same limit
HEAD_LENGTH = 65536         # bytes of a whole head
HEADER_COUNT = 100          # as http.client's and llama-server's
CHUNK_LINE = 1024           # bytes of a chunk's size line with its extensions

_TOKEN = rb"[!#$%&'*+\-.^_`|~0-9A-Za-z]+"
_REQUEST_LINE = re.compile(rb'(' + _TOKEN + rb') ([!-~]+) HTTP/1\.(?P<minor>[01])')
_STATUS_LINE = re.compile(rb'HTTP/1\.(?P<minor>[01]) ([1-9]\d\d)(?: ([^\x00-\x08\x0a-\x1f\x7f]*))?')
# No obs-fold, no blank before the colon. Anchored: else a long line without a colon is tried from each of its bytes.
_HEADER_LINE = re.compile(rb'^(' + _TOKEN + rb'):([^\x00-\x08\x0a-\x1f\x7f]*)\r\n', re.MULTILINE)
_NOT_IN_A_HEAD = re.compile(rb'[\x00-\x08\x0b\x0c\x0e-\x1f\x7f]|(?<!\r)\n|\r(?!\n|$)')
_CHUNK_SIZE = re.compile(rb'([0-9A-Fa-f]{1,15})(?:[ \t]*;[\t -~\x80-\xff]*)?')
_TARGET = re.compile(r'(?:https?://(?P<authority>[^/?#]+)|(?=/))(?P<path>/[^?#]*)?(?P<query>\?[^#]*)?', re.IGNORECASE)
_HOST = re.compile(r'(\[[0-9A-Fa-f:.]+\]|[A-Za-z0-9._~-]*)(?::([0-9]{0,5}))?')
_BAD_ESCAPE = re.compile(r'%(?![0-9A-Fa-f]{2})')
_AMBIGUOUS_PATH = re.compile(rb'[\x00-\x1f\x7f\\]|(?:^|/)\.\.?(?:;[^/]*)?(?:/|$)')
REQUEST_ID = re.compile(rb'[A-Za-z0-9._:/+=@~-]{1,128}')

Headers = List[Tuple[bytes, bytes]]
Body = Union[bytes, bytearray]

# RFC 9110, section 7.6.1, and the older ones of RFC 2616, section 13.5.1.
HOP_BY_HOP = frozenset((b'connection', b'keep-alive', b'proxy-authenticate', b'proxy-authorization', b'proxy-connection',
                        b'te', b'trailer', b'transfer-encoding', b'upgrade'))
# What does not go on to the engine beside the hop-by-hop headers: what is rewritten, what would
# make llama-server's generation survive its client, and what is between browser and gateway.
NOT_TO_ENGINE = HOP_BY_HOP | {b'host', b'content-length', b'expect', b'origin', b'x-conversation-id', b'x-request-id'}
CREDENTIALS = frozenset((b'authorization', b'x-api-key'))
NOT_TO_CLIENT = HOP_BY_HOP | {b'x-request-id'} | {b'access-control-' + name for name in (
    b'allow-origin', b'allow-credentials', b'allow-methods', b'allow-headers', b'expose-headers', b'max-age', b'allow-private-network')}


class Malformed(ValueError):
    """Bytes that are not what HTTP/1.1 says; the text says what is wrong."""


def parse_headers(block: bytes) -> Headers:
    """Header lines, each ended by CRLF, as (name, value) pairs. Raises Malformed."""
    found = _HEADER_LINE.findall(block)
    if sum([len(name) + len(value) + 3 for name, value in found]) != len(block):
        raise Malformed('a header line is malformed')
    return [(name, value.strip(b' \t')) for name, value in found]


@functools.lru_cache(maxsize=1024)
def parse_chunk_size(line: bytes) -> int:
    """The size in a chunk's first line (without CRLF). Cached, since streams repeat a few sizes. Raises Malformed."""
    match = _CHUNK_SIZE.fullmatch(line)
    if not match:
        raise Malformed('a chunk size is malformed')
    return int(match.group(1), 16)


def parse_length(value: bytes) -> int:
    """A Content-Length: plain decimal digits only. Raises Malformed."""
    if not value.isdigit():
        raise Malformed('Content-Length is not a plain decimal number')
    return int(value.lstrip(b'0')[:19] or b'0')


def check_path(path: str) -> None:
    """Refuses what another program could take for another path once it has decoded it. Raises Malformed."""
    if _BAD_ESCAPE.search(path) or _AMBIGUOUS_PATH.search(urllib.parse.unquote_to_bytes(path)):
        raise Malformed('the path has a . or .. segment, a backslash, a control character, or a % without two hexadecimal digits')


def connection_options(names: Sequence[bytes], headers: Headers) -> Set[bytes]:
    """What Connection lists, in lower case: `close`, `keep-alive`, and names of headers that are hop-by-hop."""
    return {option.strip().lower() for name, (_, value) in zip(names, headers) if name == b'connection' for option in value.split(b',')}


def passed_on(names: Sequence[bytes], headers: Headers, dropped: FrozenSet[bytes]) -> bytes:
    """Header lines that go on to the other side: less the hop-by-hop ones, those Connection names, and `dropped`."""
    if b'connection' in names:
        dropped = dropped | connection_options(names, headers) - {b'content-length'}       # that frames the body
    return b''.join([b'%s: %s\r\n' % header for name, header in zip(names, headers) if name not in dropped])


class MessageHead:
    """What the heads of requests and answers have in common. `fields` has the last value of each (lower-case) name."""

    def __init__(self, head: bytes, start_line: re.Pattern[bytes]) -> None:
        """`head` ends with the CRLF of its last header line. Raises Malformed, as those of the subclasses."""
        line, _, block = head.partition(b'\r\n')
        match = start_line.fullmatch(line)
        if not match:
            raise Malformed('its first line is malformed, or its version neither HTTP/1.0 nor HTTP/1.1')
        self.start = match
        self.version11 = match['minor'] == b'1'
        self.headers = parse_headers(block)
        self.names = [name.lower() for name, _ in self.headers]
        self.fields = dict(zip(self.names, [value for _, value in self.headers]))
        options = connection_options(self.names, self.headers) if b'connection' in self.fields else ()
        self.keep_alive = b'close' not in options and (self.version11 or b'keep-alive' in options)

    def text(self, name: bytes) -> str:
        return self.fields.get(name, b'').decode('latin-1')

    def single(self, name: bytes) -> Optional[bytes]:
        """The value of a field that must not be repeated, None where it is absent. Raises Malformed."""
        if len(self.fields) < len(self.names) and self.names.count(name) > 1:
            raise Malformed('%s is given twice' % name.decode().title())
        return self.fields.get(name)

    def framing(self) -> Tuple[bool, Optional[int]]:
        """(chunked, Content-Length). RFC 9112, section 6; where it leaves a choice, the strict one:
        request smuggling lives on the others. Raises Malformed."""
        coding, length = self.single(b'transfer-encoding'), self.single(b'content-length')
        if coding is not None and (coding.lower() != b'chunked' or length is not None):
            raise Malformed('Transfer-Encoding is something else than one chunked, or stands beside a Content-Length')
        return coding is not None, None if length is None else parse_length(length)


class RequestHead(MessageHead):
    """A request's head."""

    target, path, host = '-', '-', ''
    length, chunked, expects = 0, False, False
    for_engine: Tuple[object, bytes] = (None, b'')      # what was made of it last, and under which circumstances
    fault = ''      # what is wrong beyond the form of its lines, told once it is known whose page asks

    def __init__(self, head: bytes) -> None:
        super().__init__(head, _REQUEST_LINE)
        self.method = self.start[1].decode()
        try:
            self._read_target(self.start[2].decode())
            self._read_framing()
        except Malformed as error:
            self.fault = str(error)

    @property
    def has_body(self) -> bool:
        return self.chunked or self.length > 0 or bool(self.fault)

    def _read_target(self, target: str) -> None:
        match = _TARGET.fullmatch(target)
        if match:
            self.path = match['path'] or '/'
            self.target = self.path + (match['query'] or '')
        elif target == '*' and self.method == 'OPTIONS':
            self.path = self.target = target
        else:
            raise Malformed('the request target is neither a path nor an http URL, or has a fragment')
        check_path(self.path)
        if self.single(b'host') is None and self.version11:
            raise Malformed('Host is missing')
        self.host = self.text(b'host')
        authority = match['authority'] if match else None
        if not (_HOST.fullmatch(self.host) and _HOST.fullmatch(authority or '')):
            raise Malformed('Host, or the host of the request target, is malformed')
        self.host = authority or self.host      # RFC 9112, section 3.2.2

    def _read_framing(self) -> None:
        self.chunked, length = self.framing()
        self.length = length or 0
        if self.chunked and not self.version11:
            raise Malformed('Transfer-Encoding in HTTP/1.0')
        self.expects = self.single(b'expect') is not None
        if self.expects and self.text(b'expect').lower() != '100-continue':
            raise Malformed('Expect is something else than 100-continue')


class AnswerHead(MessageHead):
    """The head of the engine's answer. `length` is None where Content-Length does not say it."""

    def __init__(self, head: bytes) -> None:
        super().__init__(head, _STATUS_LINE)
        self.status, self.reason = int(self.start[2]), self.start[3] or b''
        self.chunked, self.length = self.framing()
        self.will_close = not self.keep_alive
        self.event_stream = self.text(b'content-type').lower().startswith('text/event-stream')
        self.passed = passed_on(self.names, self.headers, NOT_TO_CLIENT)


def _caching(parse: Callable[[bytes], Any]) -> Callable[[bytes], Any]:
    """A kept connection repeats its heads, and reading one costs more than looking it up. Long ones are not kept."""
    cached = functools.lru_cache(maxsize=256)(parse)
    return lambda head: cached(head) if len(head) <= 1024 else parse(head)


parse_request_head: Callable[[bytes], RequestHead] = _caching(RequestHead)
parse_answer_head: Callable[[bytes], AnswerHead] = _caching(AnswerHead)
END_OF_CHUNKS = b'0\r\n\r\n'


def chunk(payload: bytes) -> bytes:
    """A payload (not an empty one: that would end the body) as one chunk."""
    return b'%x\r\n%s\r\n' % (len(payload), payload)


class BodyFollower:
    """Follows the framing of a body whose bytes come in pieces."""

    done = False        # it is whole
    excess = b''        # bytes behind its end
    tail = b''          # the last four bytes of payload

    def __init__(self, collect: bool = False) -> None:
        self.payload: Optional[List[bytes]] = [] if collect else None       # what came without the framing

    def feed(self, data: bytes) -> bytes:
        """Takes a piece; returns the bytes that may be passed on as they are. Raises Malformed."""
        self.tail = (self.tail + data[-4:])[-4:]
        if self.payload is not None:
            self.payload.append(data)
        return data

    def end_of_file(self) -> None:
        """The sender has closed: says whether that is an end (`done`)."""

    def insert(self, event: bytes) -> bytes:
        """The bytes that add an event behind what was passed on, within the framing."""
        return event

    def take_payload(self) -> bytes:
        """The payload collected since the last call."""
        pieces, self.payload = self.payload or [], []
        return b''.join(pieces)


class BodyUntilClose(BodyFollower):
    """A body without a length: it ends with the connection, and nobody can tell whether it was cut."""

    def end_of_file(self) -> None:
        self.done = True


class BodyByLength(BodyFollower):
    """A body of an announced length."""

    def __init__(self, length: int, collect: bool = False) -> None:
        super().__init__(collect)
        self._left = length
        self.done = not length

    def feed(self, data: bytes) -> bytes:
        data, self.excess = data[:self._left], data[self._left:]
        self._left -= len(data)
        self.done = not self._left
        return super().feed(data)


class ChunkedBody(BodyFollower):
    """A chunked body. Boundaries are followed, not guessed: the end mark may stand inside data.

    What `feed` returns never ends within a size line, a chunk's line end or the end mark, so
    that an event can be inserted, and a cut body never looks whole.
    """

    def __init__(self, collect: bool = False) -> None:
        super().__init__(collect)
        self._left = 0          # bytes of the chunk that are still to come, its CRLF included; 0: a size line is next
        self._held = b''        # the beginning of a size line, a line end or the end mark
        self.announced = 0      # payload bytes of all chunks whose size is known

    def feed(self, data: bytes) -> bytes:
        line = data.find(b'\r\n', 0, CHUNK_LINE)
        size = len(data) - line - 4
        if (self._left or self._held or self.payload is not None or line < 1 or size < 4
                or not data.endswith(b'\r\n') or parse_chunk_size(data[:line]) != size):
            return self._feed(data)
        self.announced += size          # just one whole chunk, as most tokens come: in half of the time
        self.tail = data[-6:-2]
        return data

    def _feed(self, data: bytes) -> bytes:
        """One round a chunk, and a fast engine sends hundreds of them in a piece: hence one flat loop."""
        if self._held:
            data, self._held = self._held + data, b''
        payload, announced, left, at, end = self.payload, self.announced, self._left, 0, len(data)
        known, small = 0, b''       # where the last payload of four bytes or more ends, and the end of those behind it
        while at < end:
            if not left:
                line = data.find(b'\r\n', at, at + CHUNK_LINE)
                size = parse_chunk_size(data[at:line]) if line >= 0 else 0
                if not size:
                    data = self._no_chunk(data, at, line)
                    break
                announced += size
                at, left = line + 2, size + 2
            first, at, left = at, at + left, 0
            last = at - 2 if at - 2 < end else end
            if data[at - 2:at] not in (b'\r\n', b'\r', b''):     # as much of it as is there
                raise Malformed('a chunk is longer than its size')
            if last - first > 3:
                known, small = last, b''
            else:
                small = (small + data[first:last])[-4:]
            if payload is not None:
                payload.append(data[first:last])
        tail = data[known - 4:known] if known else self.tail
        self.tail = (tail + small)[-4:] if small else tail
        if at > end:
            left = at - end
        if left == 1:
            data, self._held, left = data[:-1], b'\r', 2
        self.announced, self._left = announced, left
        return data

    def _no_chunk(self, data: bytes, at: int, line: int) -> bytes:
        """The end mark, whose trailers are dropped, or the beginning of a line: held until it is whole."""
        end = data.find(b'\r\n\r\n', line) if line >= 0 else -1
        if end - at >= LINE_LENGTH:
            raise Malformed('the trailers are too long')
        if end >= 0:
            parse_headers(data[line + 2:end + 2])
            self.done, self.excess = True, data[end + 4:]
            return data[:at] + END_OF_CHUNKS
        if len(data) - at >= (CHUNK_LINE if line < 0 else LINE_LENGTH) or _NOT_IN_A_HEAD.search(data, at):
            raise Malformed('a chunk size or a trailer is malformed')
        self._held = data[at:]
        return data[:at]

    def insert(self, event: bytes) -> bytes:
        """Within an unfinished chunk its announced size has to be filled first: the receiver counts."""
        if not self._left:
            return chunk(event)
        room = self._left - 2
        if room < len(event):
            return event[:room] + b'\r\n' + chunk(event[room:])
        if room - len(event) > HEAD_LENGTH:
            return event        # not worth filling; it is seen by whoever reads as it arrives
        filler = room - len(event)      # an SSE comment, or a line end
        return event + (b':' + b' ' * (filler - 2) + b'\n' if filler > 1 else b'\n' * filler) + b'\r\n'


# ---------------------------------------------------------------------------------------------
# Relay

DONT_WAIT = int(getattr(socket, 'MSG_DONTWAIT', 0))     # not on Windows
RECV_SIZE = 65536
RECENT = 4096           # bytes, at least, of the end of a stream that are kept for usage and errors
READ_AHEAD = 65536      # bytes of pipelined requests after which no more are read while one is in progress
_WOULD_BLOCK = (BlockingIOError, socket.timeout)    # what SO_RCVTIMEO and SO_SNDTIMEO end in; Windows: a timeout


def set_socket_timeout(sock: socket.socket, option: int, seconds: float) -> None:
    """SO_RCVTIMEO or SO_SNDTIMEO. `settimeout` would cost a poll before each call; infinity is without limit."""
    seconds = max(seconds, 0.001) if seconds < 1e8 else 0.0     # 0 means without limit
    value: Union[bytes, int] = struct.pack('ll', int(seconds), int(seconds % 1 * 1e6)) if POSIX else int(seconds * 1000)
    sock.setsockopt(socket.SOL_SOCKET, option, value)


def shut(sock: socket.socket) -> None:
    """Ends a connection from another thread: a recv or send that blocks in it returns."""
    with contextlib.suppress(OSError):
        sock.shutdown(socket.SHUT_RDWR)


class ClientConnection:
    """A client's connection: the socket, and what was received and not yet used."""

    def __init__(self, sock: socket.socket, address: str, server: ServerConfig) -> None:
        self.sock = sock
        self.fd = sock.fileno()     # still to be known when it is closed
        self.address = address
        self.buffer = b''
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        if not LINUX:       # Windows has no MSG_DONTWAIT, and a send on macOS may wait in spite of it
            set_socket_timeout(sock, socket.SO_SNDTIMEO, server.write_timeout)
        self._usual = 0.9 * min(server.idle_timeout, server.read_timeout)   # a little less, so that a request costs no setsockopt
        self._patience = 0.0        # what SO_RCVTIMEO is set to

    def receive(self, deadline: Deadline) -> bytes:
        """Some bytes; none at end-of-file. Raises socket.timeout."""
        while True:
            remaining = deadline.remaining()
            if not remaining:
                raise socket.timeout
            if self._patience != min(self._usual, remaining):
                self._patience = min(self._usual, remaining)
                set_socket_timeout(self.sock, socket.SO_RCVTIMEO, self._patience)
            try:
                return self.sock.recv(RECV_SIZE)
            except _WOULD_BLOCK:
                continue
            except OSError:
                return b''

    def send(self, data: bytes, patience: float) -> None:
        """Sends all of it. Raises ClientGone, also where the client takes no bytes for `patience` seconds."""
        try:
            sent = self.sock.send(data, DONT_WAIT)      # nearly always all
            while sent < len(data) and self._takes_bytes(patience):
                sent += self.sock.send(memoryview(data)[sent:], DONT_WAIT)
        except _WOULD_BLOCK:
            sent = 0
            if self._takes_bytes(patience):
                return self.send(data, patience)
        except OSError:
            raise ClientGone from None
        if sent < len(data):
            raise ClientGone

    def _takes_bytes(self, patience: float) -> bool:
        """Waits until it does; False when the time is up. Where there is no poll, send itself has waited (SO_SNDTIMEO)."""
        if not DONT_WAIT:
            return True
        waiter = select.poll()
        waiter.register(self.sock, select.POLLOUT)
        return bool(waiter.poll(min(patience, 1e6) * 1000))


class Exchange(Waiter):
    """What one request holds while it is in progress, and how it is cancelled.

    Whoever waits for it, wherever, is woken: a waiter by `wake`, a blocked recv or send on
    the engine's connection by shutting that down.
    """

    method = path = '-'
    status: Optional[int] = None
    outcome = ''
    queue_seconds = 0.0
    first_byte: Optional[float] = None      # monotonic
    sent = 0                                # body bytes
    tokens: Optional[int] = None
    prompt_tokens: Optional[int] = None
    counted = False                         # GET, HEAD or POST under a forwarded prefix
    well_answered = False                   # by the engine, below 400: its path becomes a label in the metrics
    head_sent = False                       # the commit point: what follows cannot be another answer
    held_up = False
    watched = False
    heard: Optional[Callable[[], None]] = None          # told of each sign of life of the engine, where somebody wants to know
    heartbeat: Optional[Callable[[], float]] = None     # sends one where it is due, returns seconds to the next
    refusal: Optional[GatewayError] = None
    _unwoken: Any = None                    # a lock that is held until somebody wakes it: threading.Event is slower to make, to set and to wait for
    # _lock guards what follows: decided under it, a cancel never hits a connection that is no longer ours.
    gone = False                            # the client left
    finished = False
    cut: Optional[str] = None               # the error code, where it was broken off
    _engine: Optional[socket.socket] = None

    def __init__(self, connection: ClientConnection, relay: 'Relay', request_id: str) -> None:
        self.connection = connection
        self.relay = relay
        self.id = request_id
        self.client = connection.address
        self.started = self.arrived = time.monotonic()      # arrived: when the request was there whole
        self._lock = threading.Lock()

    # -- for its own thread

    def rearm(self) -> None:
        if self._unwoken is None:
            self._unwoken = threading.Lock()
        self._unwoken.acquire(False)

    def wait(self, deadline: Deadline) -> None:
        """Until somebody wakes it or the deadline has passed. Raises ClientGone, or why it is refused."""
        self.watch()
        timeout = deadline.remaining()
        if self.heartbeat:
            timeout = min(timeout, self.heartbeat())
        if not (self.gone or self.refusal):
            self._unwoken.acquire(True, min(timeout, threading.TIMEOUT_MAX))
        if self.gone:
            raise ClientGone
        if self.refusal:
            raise self.refusal

    def watch(self) -> None:
        """From now on the relay notices when the client leaves. Not done at once: most requests are over before."""
        if not self.watched:
            self.watched = True
            self.relay.post(self.relay.watch, self)

    def attach(self, engine: socket.socket) -> None:
        """The connection to the engine that a cancel has to shut. Raises ClientGone, EngineNotAccepting."""
        with self._lock:
            self._engine = engine
            if self.gone:
                raise ClientGone
            if self.cut:
                raise EngineNotAccepting('it is being stopped')

    def detach(self) -> None:
        with self._lock:
            self._engine = None

    def finish(self) -> None:
        """The request is over: the connection belongs to its own thread again."""
        with self._lock:
            self.finished = True
        if self.watched:
            self.relay.post(self.relay.unwatch, self, wake=False)

    def send(self, data: bytes) -> None:
        """Sends bytes of the answer to the client. Raises ClientGone."""
        self.held_up = True
        self.connection.send(data, self.relay.write_timeout)
        self.held_up = False

    # -- for others

    def wake(self) -> None:
        if self._unwoken is not None:
            try:
                self._unwoken.release()
            except RuntimeError:
                pass        # it has been woken already

    def refuse(self, error: GatewayError) -> None:
        """Whoever waits in line is sent away."""
        self.refusal = error
        self.wake()

    def break_off(self, code: str = '', gone: bool = False) -> None:
        """All that is done for it ends: its client is told so with this error code, or has left."""
        with self._lock:
            if self.finished:
                return
            self.gone = self.gone or gone
            self.cut = self.cut or code or None
            if self._engine is not None:
                shut(self._engine)      # under the lock: afterwards it may be somebody else's
        self.wake()

    def read_ahead(self) -> bool:
        """Called by the relay when the client's socket is readable: False when there is nothing left to watch for.

        End-of-file cancels the request; other bytes are a pipelined request, kept for its own thread.
        """
        with self._lock:
            if self.finished or len(self.connection.buffer) >= READ_AHEAD:
                return False
            try:
                data = self.connection.sock.recv(RECV_SIZE, DONT_WAIT)
            except _WOULD_BLOCK:
                return True
            except OSError:
                data = b''
            self.connection.buffer += data
        if not data:
            self.break_off(gone=True)
        return bool(data)


def has_hung_up(sock: socket.socket) -> bool:
    """Whether the other side has closed, behind bytes that nobody reads. Only Linux can tell."""
    if not POSIX:
        return False
    waiter = select.poll()
    waiter.register(sock, getattr(select, 'POLLRDHUP', 0))
    return bool(waiter.poll(0))


def finished_event(tail: bytes) -> bytes:
    """What ends an unfinished SSE event, by the last bytes of the stream."""
    if not tail or tail.endswith((b'\n\n', b'\r\n\r\n', b'\r\r')):
        return b''
    return b'\n' if tail.endswith(b'\n') else b'\n\n'


def only_comments(payload: bytes) -> bool:
    """Whether a piece of an SSE stream says nothing."""
    return all(line.startswith(b':') for line in payload.split(b'\n') if line.strip())


@dataclasses.dataclass(eq=False)
class Stream:
    """An answer on its way from the engine to a client. Once posted, it belongs to the relay's thread."""

    exchange: Exchange
    engine: socket.socket
    body: BodyFollower
    translate: str          # 'raw': as it is; 'decode': chunks undone, for HTTP/1.0; 'encode': chunks made, of a body that ends by closing
    event_stream: bool
    result: str = ''        # 'ok', 'truncated' or 'cancelled' when it is over
    ending: str = ''        # the result, once `pending` has left
    fault: str = ''         # why it was truncated
    pending: bytes = b''    # what the client did not take yet; the engine's side rests meanwhile
    sent: int = 0           # bytes of the body

    def __post_init__(self) -> None:
        self.client = self.exchange.connection.sock
        self._relay = self.exchange.relay
        self._over = threading.Lock()       # held until the relay is done with it
        self._over.acquire()
        self._as_it_is = self.translate == 'raw' and self.body.payload is None
        self.recent = bytearray()           # the end of what has passed

    def wait(self) -> None:
        """Until the relay is done with it."""
        self._over.acquire()

    def end(self, result: str) -> None:
        self.result = result
        self._over.release()

    def advance(self, data: bytes) -> bytes:
        """What the client gets for bytes of the engine's, or for its end-of-file; `ending` is set when they are the last."""
        body, out = self.body, b''
        try:
            if data:
                out = body.feed(data)
            elif not self.exchange.cut:     # else it is no end
                body.end_of_file()
            if not self._as_it_is:
                out = self._translated(out)
            if body.done:
                self.ending = 'ok'
            elif not data:
                raise Malformed('it hung up')
        except Malformed as error:
            self.ending, self.fault = 'truncated', str(error)
            out = self._error_event() if self.event_stream else b''
        self.sent += len(out)
        # One piece of memory: pieces kept as they came each lie on some of their own, cold by the stream's next token,
        # which took up to a tenth of a token's CPU among 256 streams.
        self.recent += out[-RECENT:]
        if len(self.recent) > 2 * RECENT:
            del self.recent[:-RECENT]
        return out

    def _translated(self, out: bytes) -> bytes:
        payload = self.body.take_payload() if self.body.payload is not None else out
        if self.exchange.heard and not only_comments(payload):
            self.exchange.heard()
        if self.translate == 'encode':
            return (chunk(payload) if payload else b'') + (END_OF_CHUNKS if self.body.done else b'')
        return payload if self.translate == 'decode' else out

    def _error_event(self) -> bytes:
        """The engine cannot finish: the client is told by an event, and by the end mark that never comes."""
        code = self.exchange.cut or 'engine_failed'
        text = 'the gateway is shutting down' if code == 'shutting_down' else 'the engine broke off in the middle of the answer'
        event = finished_event(self.body.tail) + b'data: ' + GatewayError(code, text).body() + b'\n\n'
        return {'raw': self.body.insert, 'encode': chunk, 'decode': bytes}[self.translate](event)

    def on_engine(self, events: int) -> None:
        """The engine's socket is readable."""
        try:
            data = self.engine.recv(RECV_SIZE, DONT_WAIT)
        except _WOULD_BLOCK:
            return
        except OSError:
            data = b''
        if not data and self.exchange.gone:     # which has shut it
            return self._relay.end(self, 'cancelled')
        self._pass_on(self.advance(data))

    def on_client(self, events: int) -> None:
        """The client's socket is readable (it leaves, or pipelines), or takes bytes again."""
        if events & WRITABLE:
            self._pass_on(self.pending)
        elif not self.exchange.read_ahead():
            self._relay.copy(self)

    def _pass_on(self, data: bytes) -> None:
        """To the client; what it does not take is kept."""
        try:
            taken = self.client.send(data, DONT_WAIT) if data else 0
        except _WOULD_BLOCK:
            taken = 0
        except OSError:
            return self._relay.end(self, 'cancelled')
        if taken if self.pending else taken < len(data):        # it gets on a little, flows again, or comes to a stop
            self.pending = data[taken:]
            if self.pending or not self.ending:
                return self._relay.copy(self)
        if self.ending and not self.pending:
            self._relay.end(self, self.ending)


READABLE, WRITABLE = 1, 4       # EPOLLIN, EPOLLOUT


class PortableEpoll:
    """What the relay needs of `select.epoll`, where there is none. Not everywhere: the selectors' own
    bookkeeping is a tenth of what a token costs."""

    def __init__(self) -> None:
        self._selector = selectors.DefaultSelector()

    def register(self, fd: int, events: int) -> None:
        self._selector.register(fd, bool(events & READABLE) * selectors.EVENT_READ | bool(events & WRITABLE) * selectors.EVENT_WRITE)

    def unregister(self, fd: int) -> None:
        self._selector.unregister(fd)

    def poll(self, timeout: Optional[float]) -> List[Tuple[int, int]]:
        return [(key.fd, bool(events & selectors.EVENT_READ) * READABLE | bool(events & selectors.EVENT_WRITE) * WRITABLE)
                for key, events in self._selector.select(timeout)]

    def close(self) -> None:
        self._selector.close()


class Relay(threading.Thread):
    """The one thread that waits for many sockets: watches the clients of requests that last, and copies all streams.

    All of it belongs to this thread; others post to its mailbox. A client that does not read
    holds up nobody: what it did not take is kept (one piece), and its engine's socket rests.
    """

    GLANCE = 0.5        # seconds between two looks at clients that take no bytes

    def __init__(self, epoll: Callable[[], Any] = getattr(select, 'epoll', PortableEpoll)) -> None:
        super().__init__(name='relay', daemon=True)
        self._epoll = epoll()
        self._listeners: Dict[int, Callable[[int], object]] = {}    # by descriptor: what is called with its events
        self._mail: Deque[Tuple[Callable[[Any], None], Any]] = collections.deque()
        self._waker, self._wakened = socket.socketpair()
        self._waker.setblocking(False)
        self._wakened.setblocking(False)
        self._asleep = True             # whether a letter has to ring
        self._held: Dict[Stream, float] = {}        # streams whose client takes no bytes, since when (monotonic), the longest first
        self._stuffed: Set[Exchange] = set()        # whose clients have pipelined so much that no more is read
        self.write_timeout = 30.0       # seconds

    # -- for others

    @property
    def is_busy(self) -> bool:
        """Whether it copies a stream or watches a client."""
        return len(self._listeners) > 1     # beside its own

    def post(self, what: Callable[[Any], None], argument: Any, wake: bool = True) -> None:
        """Has `what(argument)` done by the relay's thread, in order; at its next occasion, where `wake` is false."""
        self._mail.append((what, argument))
        if wake and self._asleep:
            self._asleep = False
            try:
                self._waker.send(b'\0')
            except OSError:
                pass        # it is full, so it rings already, or the relay has ended

    def close(self) -> None:
        self.post(sys.exit, None)

    # -- its own thread

    def run(self) -> None:
        with contextlib.closing(self._epoll), self._waker, self._wakened:
            self._listen(self._wakened.fileno(), READABLE, lambda events: self._wakened.recv(4096))
            while True:
                try:
                    self._round()
                except Exception:       # a fault in one stream is not the others': what was not done comes again in the next round
                    log.exception('internal error in the relay')

    def _round(self) -> None:
        """Waits for events, and does what they and the letters want done."""
        for fd, events in self._epoll.poll(0 if self._mail else self.GLANCE if self._held or self._stuffed else None):
            if fd in self._listeners:       # else ended by another event of the same round
                self._listeners[fd](events)
        if self._held or self._stuffed:
            self._glance()
        self._asleep = True     # before the box is emptied: a letter that comes now rings
        while self._mail:
            what, argument = self._mail.popleft()
            what(argument)

    def _glance(self) -> None:
        """Gives up clients that take no bytes for too long, and those that left behind the much that they had pipelined."""
        for stream in [stream for stream, since in self._held.items() if time.monotonic() - since > self.write_timeout]:
            self.end(stream, 'cancelled')
        for exchange in list(self._stuffed):
            if exchange.finished or has_hung_up(exchange.connection.sock):
                self._stuffed.discard(exchange)
                exchange.break_off(gone=True)

    def _listen(self, fd: int, events: int, listener: Callable[[int], object] = lambda events: None) -> None:
        """From now on to these events (0: none). The number may still stand there for a socket that was closed."""
        if self._listeners.pop(fd, None):
            try:
                self._epoll.unregister(fd)
            except OSError:
                pass
        if events:
            self._epoll.register(fd, events)
            self._listeners[fd] = listener

    def end(self, stream: Stream, result: str) -> None:
        self._held.pop(stream, None)
        self._listen(stream.engine.fileno(), 0)
        self._listen(stream.client.fileno(), 0)
        stream.exchange.held_up = False
        stream.end(result)

    # -- letters

    def watch(self, exchange: Exchange) -> None:
        """Notices when the client leaves."""
        def on_client(events: int) -> None:
            if not exchange.read_ahead() and not exchange.finished:
                self.unwatch(exchange)
                self._stuffed.add(exchange)
        if not exchange.finished:
            self._listen(exchange.connection.fd, READABLE, on_client)

    def unwatch(self, exchange: Exchange) -> None:
        self._listen(exchange.connection.fd, 0)

    def copy(self, stream: Stream) -> None:
        """Listens to what a stream needs as it stands, until its end; its exchange is woken then."""
        exchange, rests = stream.exchange, bool(stream.pending)
        if exchange.gone:
            return self.end(stream, 'cancelled')
        exchange.held_up = rests
        self._held.pop(stream, None)
        if rests:
            self._held[stream] = time.monotonic()
        reads = len(exchange.connection.buffer) < READ_AHEAD
        if not reads:
            self._stuffed.add(exchange)
        self._listen(stream.engine.fileno(), 0 if rests else READABLE, stream.on_engine)
        self._listen(stream.client.fileno(), READABLE * reads | WRITABLE * rests, stream.on_client)


# ---------------------------------------------------------------------------------------------
# Admission


class Line:
    """The waiting requests of one client, first come first served."""

    __slots__ = ('name', 'turn', 'waiting')

    def __init__(self, name: str, turn: Tuple[int, int]) -> None:
        self.name = name
        self.turn = turn        # when it was served last, then when it came: the order among lines
        self.waiting: 'collections.OrderedDict[Exchange, None]' = collections.OrderedDict()


class AdmissionQueue:
    """Lets `max_concurrency` requests in at a time; the rest waits.

    A semaphore counts the slots (an over-release raises), but it is not first come, first
    served: who released and at once asks again overtook a waiter in 200 of 200 trials. So a
    slot is handed over: release gives it to the next waiter, and only else to the semaphore.
    Grant, timeout and cancellation are decided under the lock, so no slot is lost in between.
    """

    REMEMBERED = 4096       # clients whose last turn is remembered; who falls out counts as new

    def __init__(self, config: QueueConfig) -> None:
        # _lock guards all below.
        self._lock = threading.Lock()
        self._config = config
        self._slots = threading.BoundedSemaphore(config.max_concurrency)
        self._running: Dict[Exchange, float] = {}       # who has a slot, and since when (monotonic)
        self._waiting: Dict[Exchange, Line] = {}
        self._lines: Dict[str, Line] = {}
        self._turns: List[Tuple[Tuple[int, int], str]] = []     # of the lines, sorted
        self._served: 'collections.OrderedDict[str, int]' = collections.OrderedDict()
        self._counter = itertools.count(1)
        self._service_seconds = 1.0     # how long a slot is held, a moving average
        self._bytes = 0
        self._closed = False

    def check_room(self, announced: int) -> None:
        """Refuses early, before a body is read. Raises GatewayError (429, 503)."""
        with self._lock:
            self._check_line()
            self._check_bytes(announced)

    def hold_bytes(self, count: int, announced: int = 0) -> None:
        """Counts bytes of a body that have arrived. Raises GatewayError (429) where they, or more that are announced, do not fit."""
        with self._lock:
            self._check_bytes(count + announced)
            self._bytes += count

    def drop_bytes(self, count: int) -> None:
        with self._lock:
            self._bytes -= count

    def admit(self, exchange: Exchange, deadline: Deadline, ready: Callable[[], bool]) -> None:
        """Waits for a slot, which `release` gives back. Raises GatewayError (429, 503) and ClientGone."""
        with self._lock:
            self._check_line()
            if not self._waiting and self._slots.acquire(blocking=False):
                return self._grant(exchange)
            exchange.rearm()
            self._enqueue(exchange)
        try:
            while exchange not in self._running:
                if deadline.expired:
                    raise self._timed_out(ready())
                exchange.wait(deadline)
                exchange.rearm()
        except BaseException:
            self.release(exchange)
            raise

    def release(self, exchange: Exchange) -> bool:
        """Gives the slot on, where there is one (still), and says whether somebody got it; who waits for one, leaves the line."""
        with self._lock:
            if exchange in self._waiting:
                self._leave_line(exchange)
                return False
            since = self._running.pop(exchange, None)
            if since is None:
                return False
            self._service_seconds += (time.monotonic() - since - self._service_seconds) / 8
            successor = self._hand_over()
        if successor:
            successor.wake()
        return bool(successor)

    def close(self) -> None:
        """Nobody is admitted any more; those who wait are refused."""
        with self._lock:
            self._closed = True
            waiting = list(self._waiting)
        for exchange in waiting:
            exchange.refuse(shutting_down())

    def reconfigure(self, config: QueueConfig) -> None:
        """More slots are handed out at once; fewer take effect as requests finish."""
        successors = []
        with self._lock:
            if config.order != self._config.order:      # all queue up again, in the order they came
                waiting, self._waiting, self._lines, self._turns = list(self._waiting), {}, {}, []
            else:
                waiting = []
            self._config = config
            for exchange in waiting:
                self._enqueue(exchange)
            self._slots = threading.BoundedSemaphore(config.max_concurrency)
            for _ in range(min(len(self._running), config.max_concurrency)):
                self._slots.acquire(blocking=False)
            while self._waiting and self._slots.acquire(blocking=False):
                successors.append(self._grant_next())
        for exchange in successors:
            exchange.wake()

    def position(self, exchange: Exchange) -> int:
        """The place in the queue, from 1, if nobody else came. Costs the number of clients, not of requests."""
        with self._lock:
            own = self._waiting.get(exchange)
            if own is None:
                return 1
            ahead = next(i for i, other in enumerate(own.waiting) if other is exchange)
            return 1 + ahead + sum(min(len(line.waiting), ahead + (line.turn < own.turn))
                                   for line in self._lines.values() if line is not own)

    def status(self) -> Dict[str, Any]:
        clients: Dict[str, Dict[str, int]] = collections.defaultdict(lambda: {'in_flight': 0, 'waiting': 0})
        with self._lock:
            for exchange in self._running:
                clients[exchange.client]['in_flight'] += 1
            for exchange in self._waiting:
                clients[exchange.client]['waiting'] += 1
            return {'in_flight': len(self._running), 'waiting': len(self._waiting), 'max_concurrency': self._config.max_concurrency,
                    'max_waiting': self._config.max_waiting, 'bytes': self._bytes, 'clients': clients}

    # -- under the lock

    def _grant(self, exchange: Exchange) -> None:
        self._running[exchange] = time.monotonic()
        self._served[exchange.client] = next(self._counter)
        self._served.move_to_end(exchange.client)
        if len(self._served) > self.REMEMBERED:
            self._served.popitem(last=False)

    def _enqueue(self, exchange: Exchange) -> None:
        name = exchange.client if self._config.order == 'fair' else ''      # one line for all: strict arrival order
        line = self._lines.get(name)
        if line is None:
            line = self._lines[name] = Line(name, (self._served.get(name, 0), next(self._counter)))
            bisect.insort(self._turns, (line.turn, name))
        line.waiting[exchange] = None
        self._waiting[exchange] = line

    def _leave_line(self, exchange: Exchange) -> None:
        line = self._waiting.pop(exchange)
        del line.waiting[exchange]
        if not line.waiting:
            del self._lines[line.name], self._turns[bisect.bisect_left(self._turns, (line.turn, line.name))]

    def _grant_next(self) -> Exchange:
        line = self._lines[self._turns[0][1]]
        exchange = next(iter(line.waiting))
        self._leave_line(exchange)
        self._grant(exchange)
        if line.waiting and line.name:      # its client has had its turn
            del self._turns[0]
            line.turn = (self._served[line.name], 0)
            bisect.insort(self._turns, (line.turn, line.name))
        return exchange

    def _hand_over(self) -> Optional[Exchange]:
        """A slot is free, unless a reload has withdrawn it."""
        if len(self._running) < self._config.max_concurrency:
            if self._waiting:
                return self._grant_next()
            self._slots.release()
        return None

    def _check_line(self) -> None:
        if self._closed:
            raise shutting_down()
        if len(self._waiting) >= self._config.max_waiting and len(self._running) >= self._config.max_concurrency:
            raise self._refusal('queue_full', 'the queue is full: %d requests are waiting' % len(self._waiting))

    def _check_bytes(self, count: int) -> None:
        if self._bytes + count > self._config.max_bytes:
            raise self._refusal('queue_full', 'the queue is full: the request bodies held together would be over queue.max_bytes')

    def _timed_out(self, ready: bool) -> GatewayError:
        code, why = (('queue_timeout', 'no slot became free within %g s') if ready else
                     ('engine_not_ready', 'the engine did not become ready within %g s'))
        return self._refusal(code, why % self._config.wait_timeout)

    def _refusal(self, code: str, why: str) -> GatewayError:
        retry = retry_seconds(self._service_seconds * (len(self._waiting) + 1) / self._config.max_concurrency)
        return GatewayError(code, '%s; try again in %d s' % (why, retry), retry)


class RequestBody:
    """A request's body, held once and counted in the queue's budget until it cannot be needed any more."""

    __slots__ = ('data', '_queue', '_held')

    def __init__(self, queue: AdmissionQueue) -> None:
        self.data: Body = b''
        self._queue = queue
        self._held = 0

    def hold(self, count: int) -> None:
        """Bytes have arrived. Raises GatewayError (429)."""
        self._queue.hold_bytes(count)
        self._held += count

    def check(self, announced: int) -> None:
        self._queue.hold_bytes(0, announced)

    def release(self) -> None:
        self.data = b''
        if self._held:
            self._queue.drop_bytes(self._held)
            self._held = 0


# ---------------------------------------------------------------------------------------------
# Forwarding

WHOLE_ANSWER = 32 * 1024 ** 2   # bytes; an answer of up to this announced length is passed on when it has arrived whole
RELAY_AFTER = 0.02              # seconds; the relay is told only of requests that last: telling it wakes a thread
BRIEFLY = 0.001                 # seconds of a lone stream that its own thread copies, before the relay takes over
CONNECT_TIMEOUT = 0.5           # seconds; a wedged engine's backlog is full, and meanwhile nobody sees the client leave
SMALL_BODY = 65536              # bytes; up to here head and body leave in one call, and fit into a socket's buffer
PEEK_NOW = int(socket.MSG_PEEK) | DONT_WAIT

NO_JSON = (b'', b'application/x-www-form-urlencoded')       # content types of a plain `curl -d`


def engine_lines(head: RequestHead, keyed: bool, engine: EngineConfig) -> bytes:
    """What is the same in all requests with this head."""
    lines = ['%s %s HTTP/1.1' % (head.method, head.target), 'Host: ' + bracketed(*engine.base_url)]
    dropped = NOT_TO_ENGINE
    if engine.api_key:
        lines.append('Authorization: Bearer ' + engine.api_key)
    if engine.api_key or keyed:
        dropped = dropped | CREDENTIALS
    if head.method == 'POST' and head.fields.get(b'content-type', b'').split(b';')[0].strip().lower() in NO_JSON:
        lines.append('Content-Type: application/json')
        dropped = dropped | {b'content-type'}
    return '\r\n'.join([*lines, '']).encode() + passed_on(head.names, head.headers, dropped)


def engine_head(head: RequestHead, length: int, request_id: str, keyed: bool, engine: EngineConfig) -> bytes:
    """The head of the request as the engine gets it; `keyed`: the client's credentials are the gateway's business."""
    circumstances = keyed, engine.base_url, engine.api_key
    made_for, lines = head.for_engine
    if made_for != circumstances:       # a kept connection repeats its heads
        lines = engine_lines(head, keyed, engine)
        head.for_engine = circumstances, lines
    if head.method == 'POST':
        return b'%sX-Request-Id: %s\r\nContent-Length: %d\r\n\r\n' % (lines, request_id.encode(), length)
    return b'%sX-Request-Id: %s\r\n\r\n' % (lines, request_id.encode())


def connected_socket(host: str, port: int) -> socket.socket:
    """Raises OSError, also after CONNECT_TIMEOUT.

    `socket.create_connection` would do for all: a look-up and six more system calls, half of the
    time, and with each of the calls the interpreter lock changes hands in a crowd.
    """
    if not (LINUX and re.fullmatch(r'[0-9.]+', host)):
        sock = socket.create_connection((host, port), CONNECT_TIMEOUT)
        sock.settimeout(None)
    else:
        sock = socket.socket()
        try:
            set_socket_timeout(sock, socket.SO_SNDTIMEO, CONNECT_TIMEOUT)       # also connect's, on Linux
            sock.connect((host, port))
            set_socket_timeout(sock, socket.SO_SNDTIMEO, math.inf)
        except BaseException:
            sock.close()
            raise
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return sock


class EngineConnection(http.client.HTTPConnection):
    """A connection to the engine. Sends by http.client; reads heads itself, leaner and stricter:
    the e-mail parser that http.client reads them with is half of a request's CPU.
    """

    def __init__(self, address: Tuple[str, int], generation: int) -> None:
        super().__init__(*address)
        self.generation = generation    # of the engine it leads to
        self.parked = 0.0               # since when it is idle, monotonic
        self.buffer = b''               # received and not yet used
        self.waited = False             # longer than RELAY_AFTER
        self.streamed = False           # its last answer was a stream
        self._refused = False           # what was sent met a socket that the engine had closed

    def connect(self) -> None:
        """Raises EngineNotAccepting."""
        try:
            self.sock = connected_socket(self.host, self.port)
        except OSError as error:
            raise EngineNotAccepting(str(error)) from None
        set_socket_timeout(self.sock, socket.SO_RCVTIMEO, RELAY_AFTER)

    def is_dead(self) -> bool:
        """Whether the engine has closed it while it was idle (or sent what nobody asked for)."""
        try:
            self.sock.recv(1, PEEK_NOW)
        except OSError as error:
            return not isinstance(error, BlockingIOError)
        return True

    def deliver(self, exchange: Exchange, head: bytes, body: Body) -> None:
        """Sends a request. An error is no verdict yet: the engine may have answered (413) and stopped reading."""
        try:
            if len(body) <= SMALL_BODY:
                self.send(head + body)
            else:
                exchange.watch()        # this can block
                self.send(head)
                self.send(body)
        except BrokenPipeError:
            self._refused = True
        except OSError:
            pass

    def died_idle(self) -> bool:
        """Whether a kept connection had been closed before the request came: a reset that comes after the end is EPIPE (Linux)."""
        return bool(self.parked) and not self.buffer and (
            self._refused or self.sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR) == errno.EPIPE)

    def receive(self, exchange: Exchange) -> bytes:
        """Some bytes; a wait that lasts puts the client under watch first. Raises OSError, also at end-of-file."""
        while True:
            try:
                data = self.sock.recv(RECV_SIZE)
                break
            except _WOULD_BLOCK:
                exchange.watch()
                self.waited = True
                patience = exchange.heartbeat() if exchange.heartbeat and exchange.head_sent else math.inf
                set_socket_timeout(self.sock, socket.SO_RCVTIMEO, patience)
        if not data:
            raise ConnectionResetError('it hung up')
        if exchange.heard:
            exchange.heard()
        return data

    def answer_head(self, exchange: Exchange) -> AnswerHead:
        """The head of the answer; what came behind it is in `buffer`. Raises Malformed, OSError."""
        while True:
            head, end, rest = self.buffer.partition(b'\r\n\r\n')
            if end:
                answer, self.buffer = parse_answer_head(head + b'\r\n'), rest
                if answer.status == 101:
                    raise Malformed('it switches protocols')
                if answer.status >= 200:
                    return answer
            elif len(head) > HEAD_LENGTH:
                raise Malformed('its head is too large')
            else:
                self.buffer += self.receive(exchange)

    def whole_body(self, exchange: Exchange, body: BodyFollower) -> bytes:
        """The payload of a body, when it has arrived whole. Raises Malformed, OSError."""
        body.feed(self.buffer)
        while not body.done:
            try:
                body.feed(self.receive(exchange))
            except ConnectionResetError:
                body.end_of_file()
                if not body.done:
                    raise
        self.buffer = body.excess
        return body.take_payload()


class EnginePool:
    """Kept connections to the engine, the freshest first: few and short, since llama-server gives each a worker, and 5 s."""

    KEPT = 8
    SECONDS = 3.0
    FRESH = 0.001       # seconds; who was parked this very moment is not asked whether it is dead
    PROBATION = 0.5     # seconds in which an engine that closes connections after streams has done so

    def __init__(self) -> None:
        self._parked: Deque[EngineConnection] = collections.deque()     # its own operations are atomic
        # llama-server closes a connection after a stream, and does not say so: a request sent on it meanwhile
        # would be lost. Other engines keep it. So the first one of each engine is put on probation.
        self._on_probation: Deque[EngineConnection] = collections.deque()
        self._keeps_after_stream = 0, False     # what is known: an engine's generation, and whether it does

    def take(self, address: Tuple[str, int], generation: int, kept: bool) -> EngineConnection:
        """A connection, not necessarily connected; a new one where no kept one is wanted, or there."""
        try:
            while kept:
                connection = self._parked.pop()
                idle = time.monotonic() - connection.parked
                if connection.generation == generation and idle < self.SECONDS:
                    if idle < self.FRESH and not connection.streamed or not connection.is_dead():
                        return connection
                    if connection.streamed:
                        self._keeps_after_stream = generation, False
                connection.close()
        except IndexError:      # none is left
            pass
        return EngineConnection(address, generation)

    def give(self, connection: EngineConnection) -> None:
        if connection.buffer or not DONT_WAIT:     # then nobody could tell later whether it is dead
            return connection.close()
        if connection.waited:
            connection.waited = False
            set_socket_timeout(connection.sock, socket.SO_RCVTIMEO, RELAY_AFTER)
        connection.parked = time.monotonic()
        if connection.streamed and self._keeps_after_stream != (connection.generation, True):
            return self._put_on_probation(connection)
        self._parked.append(connection)
        if len(self._parked) > self.KEPT:
            self.expire(self.SECONDS)

    def expire(self, seconds: float) -> None:
        """Closes what has been idle for longer, or is too many; and says what became of the one on probation."""
        now = time.monotonic()
        with contextlib.suppress(IndexError):       # another thread was faster
            while len(self._parked) > self.KEPT or self._parked and now - self._parked[0].parked > seconds:
                self._parked.popleft().close()
            while self._on_probation and now - self._on_probation[0].parked > min(self.PROBATION, seconds):
                connection = self._on_probation.popleft()
                self._keeps_after_stream = connection.generation, not connection.is_dead()
                connection.close()

    def _put_on_probation(self, connection: EngineConnection) -> None:
        if self._on_probation or self._keeps_after_stream[0] == connection.generation:
            connection.close()
        else:
            self._on_probation.append(connection)


class EngineAnswer:
    """An answer of the engine's that is sure to be the answer: whole, or a stream whose head is there."""

    def __init__(self, connection: EngineConnection, exchange: Exchange, method: str) -> None:
        """Raises Malformed, OSError."""
        self.connection = connection
        self.head = head = connection.answer_head(exchange)
        self.length = 0 if method == 'HEAD' or head.status in (204, 304) else head.length
        self.chunked = head.chunked and self.length != 0
        self.whole: Optional[bytes] = None
        if self.length == len(connection.buffer):
            self.whole, connection.buffer = connection.buffer, b''      # it has come with its head, as most do
        elif self.length == 0:
            self.whole = b''
        elif (exchange.head_sent and not head.event_stream) or self.length is not None and self.length <= WHOLE_ANSWER:
            self.whole = connection.whole_body(exchange, self.follower(collect=True))
        else:
            self.follower(collect=False).feed(connection.buffer)    # garbage is found while a second try is still possible
        self.ended = self.whole is not None
        connection.streamed = not self.ended
        self.connection_stays = not head.will_close and head.status < 400 and (self.chunked or self.length is not None)

    def follower(self, collect: bool) -> BodyFollower:
        """Follows the body of the answer."""
        if self.chunked:
            return ChunkedBody(collect)
        return BodyUntilClose(collect) if self.length is None else BodyByLength(self.length, collect)


Ask = Callable[[int, TryKind], EngineAnswer]    # asks the engine of this generation once


class Upstream:
    """The engine's side of a request: a try, and the second try."""

    def __init__(self, watchdog: Watchdog) -> None:
        self._watchdog = watchdog
        self._gate = watchdog.gate
        self.pool = EnginePool()

    def answer(self, exchange: Exchange, head: RequestHead, body: RequestBody, config: Config, deadline: Deadline) -> EngineAnswer:
        """The engine's answer: the commit point. Up to there a try that breaks is followed by a second one.

        A whole answer has left the engine by then; at the end of any other, `part` has to be called.
        Raises GatewayError: 502 when it broke twice, 503 and 429 at the deadline.
        """
        data = body.data if head.method == 'POST' else b''      # engines disagree on the framing of a GET that has a body
        answer = self._first_or_second(
            exchange, functools.partial(self._ask, exchange, head, data, bool(config.server.api_keys)), deadline,
            config.queue.wait_timeout, TryKind.FIRST if head.method == 'POST' else TryKind.LIGHT)
        body.release()      # it will not be sent again
        if answer.whole is not None:
            self.part(exchange, answer)
        return answer

    def part(self, exchange: Exchange, answer: EngineAnswer) -> None:
        """The engine is done with it."""
        exchange.detach()
        if answer.ended and answer.connection_stays and not (exchange.gone or exchange.cut):    # else it may have been shut meanwhile
            self.pool.give(answer.connection)
        else:
            answer.connection.close()
        self._gate.leave(exchange)

    def _first_or_second(self, exchange: Exchange, ask: Ask, deadline: Deadline, patience: float, kind: TryKind) -> EngineAnswer:
        try:
            return self._try(exchange, ask, deadline, kind)
        except EngineBroke as error:
            self._note_broken(exchange, 1, error)
            dying = error.hung_up
        with self._gate.second_try(exchange, dying):
            try:
                return self._try(exchange, ask, Deadline(patience), TryKind.SECOND)
            except EngineBroke as error:
                self._note_broken(exchange, 2, error)
                if error.hung_up:
                    self._gate.await_death(exchange)        # so that the next one does not meet the same dying engine
                raise GatewayError('engine_failed', 'the engine failed on this request twice (%s)' % error) from None

    @staticmethod
    def _note_broken(exchange: Exchange, attempt: int, error: EngineBroke) -> None:
        if exchange.cut == 'shutting_down':
            raise shutting_down() from None
        log.warn('the engine broke a request', id=exchange.id, attempt=attempt, error=str(error))

    def _try(self, exchange: Exchange, ask: Ask, deadline: Deadline, kind: TryKind) -> EngineAnswer:
        """One try, as soon as it may start. Raises EngineBroke, and what `TryGate.enter` raises."""
        while True:
            try:
                generation = self._gate.enter(exchange, deadline, kind)
            finally:
                if kind is not TryKind.SECOND:
                    exchange.queue_seconds = time.monotonic() - exchange.arrived
            try:
                return ask(generation, kind)
            except EngineNotAccepting:      # it never had the request: this was no try
                if deadline.expired:
                    raise self._gate.not_ready() from None
                self._gate.await_death(exchange)

    def _ask(self, exchange: Exchange, head: RequestHead, body: Body, keyed: bool, generation: int, kind: TryKind) -> EngineAnswer:
        engine = self._watchdog.config      # not the request's own: a reload may have moved the engine while it waited
        exchange.heard = self._watchdog.heard_answer if engine.hang_timeout else None
        message = engine_head(head, len(body), exchange.id, keyed, engine)
        try:
            while True:
                connection = self.pool.take(engine.base_url, generation, kept=kind is not TryKind.SECOND)
                try:
                    return self._ask_on(connection, exchange, head.method, message, body)
                except DiedIdle:
                    pass
        except BaseException:
            self._gate.leave(exchange)
            if exchange.gone:
                raise ClientGone from None
            raise

    @staticmethod
    def _ask_on(connection: EngineConnection, exchange: Exchange, method: str, message: bytes, body: Body) -> EngineAnswer:
        try:
            if connection.sock is None:
                connection.connect()
            exchange.attach(connection.sock)
            connection.deliver(exchange, message, body)
            return EngineAnswer(connection, exchange, method)
        except BaseException as error:
            exchange.detach()
            died_idle = connection.died_idle() and not exchange.cut
            connection.close()
            if died_idle and isinstance(error, OSError):
                raise DiedIdle from None
            if isinstance(error, (OSError, Malformed)):
                broke = EngineBroke(str(error) or type(error).__name__)
                broke.hung_up = isinstance(error, OSError)
                raise broke from None
            raise


# ---------------------------------------------------------------------------------------------
# Metrics

OWN_PATHS = ('/', '/healthz', '/livez', '/status', '/metrics')
OUTCOMES = ('ok', 'refused', 'cancelled', 'failed', 'truncated')
BUCKETS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0)    # seconds
KNOWN_PATHS = 64        # forwarded paths that get a label of their own
MINUTES = 15            # of history for the status page

Samples = Iterable[Tuple[str, object]]


def metric(name: str, kind: str, doc: str, samples: Samples) -> str:
    """A metric in Prometheus' text format; a sample is (suffix and labels, value)."""
    lines = ['# HELP %s %s' % (name, doc), '# TYPE %s %s' % (name, kind)]
    return '\n'.join(lines + ['%s%s %s' % (name, suffix, value) for suffix, value in samples]) + '\n'


class Histogram:
    """Counts of seconds in BUCKETS."""

    def __init__(self) -> None:
        self._counts = [0] * (len(BUCKETS) + 1)
        self._sum = 0.0

    def observe(self, seconds: float) -> None:
        self._counts[bisect.bisect_left(BUCKETS, seconds)] += 1
        self._sum += seconds

    def samples(self) -> Samples:
        totals = list(itertools.accumulate(self._counts))
        buckets = [('_bucket{le="%s"}' % bound, total) for bound, total in zip([*BUCKETS, '+Inf'], totals)]
        return [*buckets, ('_sum', self._sum), ('_count', totals[-1])]


class Record(NamedTuple):
    """What the log says of a request that is over."""
    id: str
    client: str
    method: str
    path: str
    status: int
    outcome: str
    queue_ms: float
    first_byte_ms: Optional[float]
    total_ms: float
    bytes: int
    tokens: Optional[int]

    def fields(self) -> Dict[str, object]:
        return {name: round(value, 1) if type(value) is float else value for name, value in self._asdict().items()}

    def pairs(self) -> str:
        """As `logfmt` writes it, which takes five times as long as the usual case, where nothing has to be quoted."""
        if self.first_byte_ms is None or not (self.client and PLAIN_WORD.fullmatch(self.id + self.client + self.path)):
            return logfmt({'msg': 'request', **self.fields()})
        return ('msg=request id=%s client=%s method=%s path=%s status=%s outcome=%s '
                'queue_ms=%.1f first_byte_ms=%.1f total_ms=%.1f bytes=%s tokens=%s'
                % (*self[:-1], 'null' if self.tokens is None else self.tokens))     # type: ignore[str-format]


class Metrics:
    """What happened so far: counters, histograms, the recent requests. All bounded."""

    def __init__(self) -> None:
        # _lock guards all below.
        self._lock = threading.Lock()
        self._started = time.monotonic()
        self._answers: Dict[Tuple[str, int], int] = collections.defaultdict(int)    # by path and status
        self._paths: Set[str] = set()
        self._outcomes = dict.fromkeys(OUTCOMES, 0)
        self._tokens = {'prompt': 0, 'completion': 0}
        self._queue_wait, self._first_byte, self._duration = Histogram(), Histogram(), Histogram()
        self._recent: Deque[Tuple[float, Record]] = collections.deque(maxlen=20)
        self._minutes: Deque[Dict[str, int]] = collections.deque(maxlen=MINUTES)

    def note(self, exchange: Exchange, record: Record, seconds: float) -> None:
        """A request is over, `seconds` after it began."""
        now = time.time()
        with self._lock:
            self._answers[self._label(exchange), record.status] += 1
            if not exchange.counted:
                return
            self._outcomes[record.outcome] += 1
            self._duration.observe(seconds)
            self._queue_wait.observe(exchange.queue_seconds)
            if exchange.first_byte is not None:
                self._first_byte.observe(exchange.first_byte - exchange.started)
            self._recent.append((now, record))
            minute = self._minutes[-1] if self._minutes else {'at': -60}
            if not minute['at'] <= now < minute['at'] + 60:
                minute = {'at': int(now) // 60 * 60, 'requests': 0, 'tokens': 0}
                self._minutes.append(minute)
            minute['requests'] += 1
            if exchange.tokens or exchange.prompt_tokens:
                self._tokens['prompt'] += exchange.prompt_tokens or 0
                self._tokens['completion'] += exchange.tokens or 0
                minute['tokens'] += exchange.tokens or 0

    def _label(self, exchange: Exchange) -> str:
        path = exchange.path
        if path in OWN_PATHS or path in self._paths:
            return path
        if not exchange.well_answered or len(self._paths) >= KNOWN_PATHS:
            return 'other'
        self._paths.add(path)
        return path

    def status(self) -> Dict[str, Any]:
        with self._lock:
            return {'uptime_seconds': round(time.monotonic() - self._started, 3),
                    'requests': {'total': sum(self._outcomes.values()), **self._outcomes},
                    'tokens': dict(self._tokens), 'recent': [{'time': log_time(at), **record.fields()} for at, record in self._recent],
                    'minutes': [dict(m) for m in self._minutes]}

    def text(self) -> str:
        """In Prometheus' text format."""
        with self._lock:
            answers = [('{path="%s",status="%d"}' % (path.replace('"', r'\"'), status), count)
                       for (path, status), count in sorted(self._answers.items())]
            outcomes = [('{outcome="%s"}' % name, count) for name, count in self._outcomes.items()]
            tokens = [('{kind="%s"}' % kind, count) for kind, count in self._tokens.items()]
            waits, firsts, durations = self._queue_wait.samples(), self._first_byte.samples(), self._duration.samples()
        return ''.join([
            metric('gollama_requests_total', 'counter', 'Requests by path and status.', answers),
            metric('gollama_requests_outcome_total', 'counter', 'Requests under a forwarded prefix by outcome.', outcomes),
            metric('gollama_tokens_total', 'counter', "Tokens, as the engine's usage or timings say.", tokens),
            metric('gollama_queue_wait_seconds', 'histogram', 'Time a request waited for its turn.', waits),
            metric('gollama_first_byte_seconds', 'histogram', 'Time from a request to the first byte of its answer.', firsts),
            metric('gollama_request_seconds', 'histogram', 'Time from a request to the end of its answer.', durations)])


_USAGE = re.compile(rb'"(completion_tokens|predicted_n|prompt_tokens|prompt_n)"\s*:\s*(\d{1,12})')
_ERROR_EVENT = re.compile(rb'^(?:data: ?\{\s*"error"\s*:|error: ?\{)', re.MULTILINE)


def read_answer(exchange: Exchange, text: bytes, event_stream: bool) -> None:
    """Takes the token counts from the engine's `usage` or `timings` (the last ones count), and notices an error event."""
    at = max(text.rfind(b'"usage"'), text.rfind(b'"timings"'))
    for name, count in _USAGE.findall(text, at) if at >= 0 else ():
        if name in (b'completion_tokens', b'predicted_n'):
            exchange.tokens = int(count)
        else:
            exchange.prompt_tokens = int(count)
    if event_stream and exchange.outcome == 'ok' and b'error' in text and _ERROR_EVENT.search(text):
        exchange.outcome = 'failed'


# ---------------------------------------------------------------------------------------------
# Status page

PAGE = r"""<!doctype html>
<html lang="en">
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>gollama</title>
<link rel="icon" href="data:,">
<style>
:root {
  color-scheme: light dark;
  --back: #f4f5f7; --card: #fff; --line: #dfe3e8; --ink: #1c2127; --dim: #5a6572;
  --accent: #2458d3; --on-accent: #fff; --good: #1a7f37; --wait: #96610a; --bad: #c0272d;
}
@media (prefers-color-scheme: dark) { :root {
  --back: #0e1116; --card: #171c23; --line: #2b323c; --ink: #e6e9ed; --dim: #9aa5b1;
  --accent: #7ba6ff; --on-accent: #0e1116; --good: #4ac26b; --wait: #e0ae45; --bad: #ff7b72;
} }
* { box-sizing: border-box; } [hidden] { display: none !important; }
body { margin: 0 auto; max-width: 76rem; padding: 1rem; background: var(--back); color: var(--ink);
  font: 15px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "Noto Sans", sans-serif; }
h1 { display: inline; margin-right: .8rem; font-size: 1.1rem; }
h2 { margin: 0 0 .5rem; font-size: .8rem; font-weight: 600; color: var(--dim); }
main { margin: .8rem 0; }
main, .view, .tiles, .pair { display: grid; gap: .8rem; grid-template-columns: minmax(0, 1fr); }
.tiles { grid-template-columns: repeat(auto-fit, minmax(min(100%, 12rem), 1fr)); }
.pair { grid-template-columns: repeat(auto-fit, minmax(min(100%, 28rem), 1fr)); }
section { min-width: 0; padding: 1rem; background: var(--card); }
section, textarea, input, button { border: 1px solid var(--line); border-radius: .5rem; }
.good { color: var(--good); } .wait { color: var(--wait); } .bad { color: var(--bad); } .dim { color: var(--dim); }
.gone .view, .gone dl { opacity: .5; }
.big { font-size: 1.7rem; line-height: 1.25; }
.state { padding-left: .8rem; border-left: .4rem solid; } .state strong { margin-right: .8rem; }
.state span { display: inline-block; color: var(--ink); }
dl { display: flex; flex-wrap: wrap; gap: .4rem 2rem; margin: .8rem 0 0; } dd { margin: 0; overflow-wrap: anywhere; }
dt, .ends { font-size: .8rem; color: var(--dim); }
.level { height: .3rem; margin-top: .6rem; background: var(--line); } .level i { display: block; height: 100%; background: var(--accent); }
.chart { display: flex; gap: 3px; align-items: flex-end; height: 5rem; border-bottom: 1px solid var(--line); }
.chart i { flex: 1; border-radius: 3px 3px 0 0; background: var(--accent); } .chart i:last-child { opacity: .55; }
.ends { display: flex; justify-content: space-between; }
.scroll { overflow: auto; max-height: 19rem; } .tail { display: flex; flex-direction: column-reverse; }
table { width: 100%; border-collapse: collapse; font-size: .87rem; font-variant-numeric: tabular-nums; }
th, td { padding: .3rem 1rem .3rem 0; text-align: left; white-space: nowrap; border-bottom: 1px solid var(--line); }
th { position: sticky; top: 0; background: var(--card); font-weight: 500; color: var(--dim); }
td { max-width: 15rem; overflow: hidden; text-overflow: ellipsis; }
:is(th, td):nth-child(n+5) { text-align: right; }
pre, .answer { margin: 0; white-space: pre-wrap; overflow-wrap: anywhere; }
pre { font: .8rem/1.5 ui-monospace, Menlo, Consolas, "DejaVu Sans Mono", monospace; }
textarea, input { display: block; width: 100%; margin: .3rem 0; padding: .5rem; font: inherit; color: inherit; background: var(--back); }
button { margin: .4rem .6rem .4rem 0; padding: .4rem 1.2rem; font: inherit; color: var(--on-accent); background: var(--accent); }
:focus-visible { outline: 2px solid var(--accent); outline-offset: 2px; }
@media (max-width: 40rem) {
  body, section { padding: .7rem; } td { max-width: 9rem; }
  .tiles { grid-template-columns: repeat(2, minmax(0, 1fr)); }
}
</style>
<h1>gollama</h1><span id="version" class="dim"></span>
<main>
  <section aria-label="Engine">
    <div id="state" class="state dim" role="status"><strong id="word" class="big">Asking…</strong><span id="meaning"></span></div>
    <dl id="facts"></dl>
    <noscript>This page needs JavaScript. /status says the same as JSON.</noscript>
  </section>
  <section id="ask" hidden><form id="key-form">
    <label for="key">This gateway asks for a key. It is kept for this tab only.</label>
    <input id="key" type="password" autocomplete="off" required>
    <button>Use this key</button><span id="key-note" class="bad" role="alert"></span>
  </form></section>
  <div id="view" class="view" hidden>
    <div class="tiles">
      <section><h2>In the engine</h2><div id="in-flight" class="big"></div><div class="level"><i id="in-flight-level"></i></div></section>
      <section><h2>Waiting</h2><div id="waiting" class="big"></div><div class="level"><i id="waiting-level"></i></div></section>
      <section><h2>Requests</h2><div id="total" class="big"></div><div id="outcomes" class="dim"></div></section>
      <section><h2>Tokens written</h2><div id="written" class="big"></div><div id="read" class="dim"></div></section>
    </div>
    <div class="pair">
      <section><h2>Requests a minute</h2><div id="requests-chart" class="chart" role="img"></div>
        <div class="ends"><span>15 minutes ago</span><span id="requests-peak"></span><span>now</span></div></section>
      <section><h2>Tokens a minute</h2><div id="tokens-chart" class="chart" role="img"></div>
        <div class="ends"><span>15 minutes ago</span><span id="tokens-peak"></span><span>now</span></div></section>
    </div>
    <section><h2>Last requests</h2><div class="scroll" tabindex="0" role="region" aria-label="Last requests"><table>
      <thead><tr><th>When<th>Outcome<th>Client<th>Request<th>Waited<th>First byte<th>In all<th>Tokens<th>Tokens/s</thead>
      <tbody id="recent"></tbody></table></div></section>
    <div class="pair">
      <section><h2>Who is in the line</h2><div class="scroll" tabindex="0" role="region" aria-label="Who is in the line"><table>
        <thead><tr><th>Client<th>In the engine<th>Waiting</thead><tbody id="clients"></tbody></table></div></section>
      <section><h2>The engine’s last lines</h2>
        <div class="scroll tail" tabindex="0" role="region" aria-label="The engine’s last lines"><pre id="output"></pre></div></section>
    </div>
    <section><form id="try-form">
      <h2><label for="prompt">Try a prompt</label></h2>
      <textarea id="prompt" rows="2" placeholder="Say hello in five languages."></textarea>
      <button id="send">Send</button><span id="note" class="dim" role="status"></span>
    </form><div id="answer" class="answer scroll" tabindex="0" role="region" aria-label="Answer"></div></section>
  </div>
</main>
<span class="dim">The same as JSON: /status. For Prometheus: /metrics.</span>
<script>
'use strict';
const states = {
  starting: ['wait', 'Starting', 'The model is being loaded; requests wait.'],
  ready: ['good', 'Ready', 'Requests are answered.'],
  died: ['bad', 'Died', 'The engine ended by itself and is started again; requests wait.'],
  hung: ['bad', 'Hung', 'The engine stopped answering and is being killed; requests wait.'],
  backoff: ['wait', 'Restarting soon', 'A pause before the engine is started again; requests wait.'],
  stopping: ['wait', 'Stopping', 'No new requests are taken.'],
  gone: ['bad', 'No gateway', 'It does not answer; this page asks again every two seconds.'],
  locked: ['wait', 'Locked', 'A key is needed to look inside.'],
};
const $ = id => document.getElementById(id), newline = String.fromCharCode(10);
let timer, running;
const count = n => n == null ? '–' : n.toLocaleString('en-US');
const clock = seconds => new Date(seconds * 1000).toLocaleTimeString([], {hourCycle: 'h23'});
const short = ms => ms == null ? '–' : ms < 1000 ? Math.round(ms) + ' ms' : ms < 60000 ? (ms / 1000).toFixed(1) + ' s' : span(ms / 1000);
function span(seconds) {
  for (const [size, unit, part, name] of [[86400, ' d ', 3600, ' h'], [3600, ' h ', 60, ' min'], [60, ' min ', 1, ' s']])
    if (seconds >= size) return Math.floor(seconds / size) + unit + Math.floor(seconds % size / part) + name;
  return Math.floor(seconds) + ' s';
}

// Everything comes onto the page as text, and what has not changed stays as it is.
function element(tag, properties, ...children) {
  const node = Object.assign(document.createElement(tag), properties);
  node.append(...children);
  return node;
}
function put(id, ...children) {
  const fresh = $(id).cloneNode();
  fresh.append(...children);
  if (!fresh.isEqualNode($(id))) $(id).replaceChildren(...fresh.childNodes);
}
const row = (...cells) => element('tr', {}, ...cells.map(cell => cell instanceof Node ? cell : element('td', {}, cell)));
function show(state) {
  const [colour, word, meaning] = states[state] || ['dim', state, ''];
  $('state').className = 'state ' + colour;
  put('word', word);
  put('meaning', meaning);
  document.title = word + ' – gollama';
  document.body.className = state;
  $('ask').hidden = state !== 'locked';
  $('facts').hidden = $('view').hidden = state === 'locked' || state === 'gone' && $('view').hidden;
}
function draw({version, uptime_seconds, engine, queue, requests, tokens, recent, minutes, draining, now = Date.now() / 1000}) {
  show(draining ? 'stopping' : engine.state);
  put('version', version + ', up for ' + span(uptime_seconds));
  put('facts', ...Object.entries({
    'Since': clock(now - engine.state_seconds) + ' (' + span(engine.state_seconds) + ')',
    'Start took': short(engine.ready_seconds && engine.ready_seconds * 1000),
    'Restarts': count(engine.restarts), 'Last exit': engine.last_exit || 'none', 'Process': engine.pid || '–',
  }).map(([name, value]) => element('div', {}, element('dt', {}, name), element('dd', {}, value))));
  level('in-flight', queue.in_flight, queue.max_concurrency);
  level('waiting', queue.waiting, queue.max_waiting);
  put('total', count(requests.total));
  const outcomes = ['ok', 'refused', 'cancelled', 'failed', 'truncated'].filter(name => requests[name]);
  put('outcomes', outcomes.map(name => count(requests[name]) + ' ' + name).join(', '));
  put('written', count(tokens.completion));
  put('read', count(tokens.prompt) + ' read in prompts');
  chart('requests', minutes, now);
  chart('tokens', minutes, now);
  put('recent', ...recent.length ? recent.reverse().map(request) : [row(element('td', {colSpan: 9}, 'none yet'))]);
  const clients = Object.entries(queue.clients).map(([name, its]) => row(name, count(its.in_flight), count(its.waiting)));
  put('clients', ...clients.length ? clients : [row(element('td', {colSpan: 3}, 'nobody'))]);
  put('output', engine.output.join(newline));
}
function level(id, value, limit) {
  put(id, count(value) + ' of ' + count(limit));
  $(id + '-level').style.width = 100 * value / (limit || 1) + '%';
}
function chart(name, minutes, now) {
  const first = Math.floor(now / 60) - 14, bars = new Array(15).fill(0);
  for (const minute of minutes) bars[Math.floor(minute.at / 60) - first] = minute[name];
  const peak = Math.max(...bars);
  put(name + '-peak', 'highest: ' + count(peak));
  $(name + '-chart').ariaLabel = name + ' a minute, oldest first: ' + bars.join(', ');
  put(name + '-chart', ...bars.map((n, i) => element('i', {
    title: clock(60 * (first + i)) + ': ' + count(n), style: 'height: ' + 100 * n / (peak || 1) + '%',
  })));
}
function request(r) {
  const colour = {ok: 'good', refused: 'wait', failed: 'bad', truncated: 'bad'}[r.outcome] || 'dim';
  const seconds = (r.total_ms - r.queue_ms) / 1000, rate = r.tokens && seconds > 0 ? (r.tokens / seconds).toFixed(1) : '–';
  return row(r.time ? clock(Date.parse(r.time) / 1000) : '–', element('td', {className: colour}, r.outcome + ' ' + r.status), r.client,
    r.method + ' ' + r.path, short(r.queue_ms), short(r.first_byte_ms), short(r.total_ms), count(r.tokens), rate);
}

async function call(path, options) {
  const key = sessionStorage.getItem('key'), bearer = key && {Authorization: 'Bearer ' + key};
  const answer = await fetch(path, {cache: 'no-store', headers: {'Content-Type': 'application/json', ...bearer}, ...options});
  if (answer.status === 401) {
    show('locked');
    put('key-note', key ? 'This key is not accepted.' : '');
    $('key').focus();
  }
  if (!answer.ok) throw new Error((await answer.json()).error.message);
  return answer;
}
async function poll() {
  try {
    draw(await (await call('status', {signal: AbortSignal.timeout(5000)})).json());
  } catch (fault) {
    if ($('ask').hidden) show('gone');
  }
  clearTimeout(timer);
  if ($('ask').hidden) timer = setTimeout(poll, 2000);
}

async function answer(content) {
  const started = Date.now(), body = JSON.stringify({messages: [{role: 'user', content}], stream: true});
  const stream = await call('v1/chat/completions', {method: 'POST', body, signal: running.signal});
  const reader = stream.body.getReader(), decoder = new TextDecoder();
  let tokens = 0, rest = '', whole = false;
  for (let part; !(part = await reader.read()).done;) {
    const lines = (rest + decoder.decode(part.value, {stream: true})).split(newline);
    rest = lines.pop();
    for (const line of lines) {
      if (line.startsWith(': ')) put('note', line.slice(1));
      if (line.startsWith('data: [DONE]')) whole = true;
      if (whole || !line.startsWith('data:')) continue;
      const event = JSON.parse(line.slice(5)), {delta = {}} = (event.choices || [])[0] || {};
      if (event.error) throw new Error(event.error.message);
      $('answer').append(element('span', {className: 'dim'}, delta.reasoning_content || ''), delta.content || '');
      if (delta.content || delta.reasoning_content) tokens++, put('note', 'Being answered…');
      if (event.usage) tokens = event.usage.completion_tokens;
    }
    $('answer').scrollTop = $('answer').scrollHeight;
  }
  return whole ? count(tokens) + ' tokens in ' + short(Date.now() - started) : 'The answer was cut off.';
}
$('try-form').onsubmit = async event => {
  event.preventDefault();
  if (running) return running.abort();
  running = new AbortController();
  put('answer');
  put('send', 'Stop');
  put('note', 'Waiting…');
  const content = $('prompt').value || $('prompt').placeholder;
  const told = {AbortError: 'Stopped.', TypeError: 'The connection was lost.'};
  put('note', await answer(content).catch(fault => told[fault.name] || fault.message));
  running = null;
  put('send', 'Send');
};
$('prompt').onkeydown = event => event.key === 'Enter' && (event.ctrlKey || event.metaKey) && $('try-form').requestSubmit();
$('key-form').onsubmit = event => {
  event.preventDefault();
  sessionStorage.setItem('key', $('key').value);
  $('ask').hidden = true;
  poll();
};
document.onvisibilitychange = () => document.hidden || poll();
poll();
</script>
"""


@functools.lru_cache(maxsize=1)
def status_page() -> Tuple[bytes, str]:
    """The page, and the Content-Security-Policy that admits its own style and script and nothing else."""
    def digest(tag: str) -> str:
        inside = PAGE.partition('<%s>' % tag)[2].partition('</%s>' % tag)[0]
        return "'sha256-%s'" % base64.b64encode(hashlib.sha256(inside.encode()).digest()).decode()
    policy = ("default-src 'none'; style-src %s; script-src %s; connect-src 'self'; img-src data:; base-uri 'none'; "
              "form-action 'none'; frame-ancestors 'none'" % (digest('style'), digest('script')))
    return PAGE.encode(), policy


# ---------------------------------------------------------------------------------------------
# HTTP front: reading

LINGER_PAUSE, LINGER_TOTAL = 5.0, 30.0      # seconds; nginx's lingering_timeout and lingering_time


def malformed(why: object) -> GatewayError:
    return GatewayError('bad_request', 'malformed request: %s' % why)


def body_too_large(server: ServerConfig) -> GatewayError:
    return GatewayError('body_too_large', 'the request body is larger than %d bytes (server.max_body)' % server.max_body)


def check_size(head: bytes) -> None:
    """Refuses a head, whole or not yet, that is too large. Raises GatewayError (414, 431)."""
    if len(head) <= LINE_LENGTH and head.count(b'\n') <= HEADER_COUNT + 1:
        return
    first, *others = head.split(b'\r\n')
    if len(first) > LINE_LENGTH:
        raise GatewayError('uri_too_long', 'the request line is longer than %d bytes' % LINE_LENGTH)
    if len(head) > HEAD_LENGTH or len(others) > HEADER_COUNT + 1 or any(len(line) > LINE_LENGTH for line in others):
        raise GatewayError('headers_too_large', 'more than %d headers, one longer than %d bytes, or all together than %d'
                           % (HEADER_COUNT, LINE_LENGTH, HEAD_LENGTH))


class RequestReader:
    """Reads requests off a client's connection, within all limits."""

    def __init__(self, connection: ClientConnection) -> None:
        self._connection = connection

    def _receive(self, deadline: Deadline) -> bytes:
        """Some bytes. Raises GatewayError (408), and ClientGone at end-of-file."""
        try:
            data = self._connection.receive(deadline)
        except socket.timeout:
            raise GatewayError('request_timeout', 'the request did not arrive in time (server.read_timeout)') from None
        if not data:
            raise ClientGone
        return data

    def wait_for_request(self, idle: Deadline) -> bool:
        """Until the first byte of a request is there; False where none came."""
        connection, forgiven = self._connection, 2      # empty lines before it; RFC 9112, section 2.2
        try:
            while True:
                if forgiven and connection.buffer.startswith(b'\r\n'):
                    connection.buffer, forgiven = connection.buffer[2:], forgiven - 1
                elif connection.buffer in (b'', b'\r'):
                    connection.buffer += self._receive(idle)
                else:
                    return True
        except (GatewayError, ClientGone):
            return False

    def head(self, deadline: Deadline) -> RequestHead:
        """The next request's head. Raises GatewayError (400, 408, 414, 431) and ClientGone."""
        connection, seen = self._connection, 0      # bytes that were looked at: a trickled head is not read again from its start
        while True:
            end = connection.buffer.find(b'\r\n\r\n', max(0, seen - 3))
            if end >= 0:
                break
            last_line = len(connection.buffer) - connection.buffer.rfind(b'\n')
            if last_line > LINE_LENGTH or len(connection.buffer) > HEAD_LENGTH or connection.buffer.count(b'\n') > HEADER_COUNT + 1:
                check_size(connection.buffer)
            if _NOT_IN_A_HEAD.search(connection.buffer, max(0, seen - 1)):      # it would never end: bare line feeds, or TLS
                raise malformed('a control character, a bare CR or a bare LF')
            seen = len(connection.buffer)
            connection.buffer += self._receive(deadline)
        head, connection.buffer = connection.buffer[:end + 2], connection.buffer[end + 4:]
        check_size(head)
        try:
            return parse_request_head(head)
        except Malformed as error:
            raise malformed(error) from None

    def body_at_once(self, head: RequestHead, body: RequestBody) -> bool:
        """Takes the body that has come with its head, as most do; False where it has not. Raises GatewayError (429)."""
        connection = self._connection
        if head.chunked or head.length > len(connection.buffer):
            return False
        body.hold(head.length)
        body.data, connection.buffer = connection.buffer[:head.length], connection.buffer[head.length:]
        return True

    def body(self, head: RequestHead, body: RequestBody, server: ServerConfig) -> None:
        """Reads the body whole. Raises GatewayError (400, 408, 413, 429) and ClientGone."""
        connection = self._connection
        if head.expects and head.version11:
            connection.send(b'HTTP/1.1 100 Continue\r\n\r\n', server.write_timeout)
        follower = ChunkedBody(collect=True) if head.chunked else BodyByLength(head.length, collect=True)
        body.data = whole = bytearray()
        while not follower.done:
            data, connection.buffer = connection.buffer or self._receive(Deadline(server.read_timeout)), b''
            try:
                follower.feed(data)
            except Malformed as error:
                raise malformed(error) from None
            if isinstance(follower, ChunkedBody):
                if follower.announced > server.max_body:
                    raise body_too_large(server)
                body.check(follower.announced - len(whole))
            payload = follower.take_payload()
            body.hold(len(payload))
            whole += payload
        connection.buffer = follower.excess

    def linger(self) -> None:
        """Reads and drops what a refused client still sends, so that it sees the answer: closing at once would reset it."""
        self._connection.buffer = b''
        total = Deadline(LINGER_TOTAL)
        try:
            self._connection.sock.shutdown(socket.SHUT_WR)
            while self._connection.receive(Deadline(min(LINGER_PAUSE, total.remaining()))):
                pass
        except OSError:     # a timeout, too
            pass


# ---------------------------------------------------------------------------------------------
# HTTP front: rules of admission

# Names that nobody can own in the public DNS, so no stranger's page can point them here.
LOCAL_SUFFIXES = ('.local', '.localhost', '.internal', '.lan', '.home.arpa', '.svc', '.cluster.local')


def host_name(host: str) -> str:
    """The name of a Host header, without its port."""
    match = _HOST.fullmatch(host)
    return match.group(1).lower().rstrip('.') if match else host


@functools.lru_cache(maxsize=256)
def is_local_name(host: str) -> bool:
    """Whether a Host header names this machine in a way that no page of a stranger's can bring about."""
    name = host_name(host)
    if '.' not in name and ':' not in name or name.endswith(LOCAL_SUFFIXES) or name == socket.gethostname().lower():
        return True
    try:
        return bool(ipaddress.ip_address(name.strip('[]')))
    except ValueError:
        return False


class AccessRules:
    """Who may ask: keys, browser origins, host names."""

    def __init__(self, server: ServerConfig) -> None:
        self._keys = [(name, secret.encode()) for name, secret in server.api_keys.items()]
        self._origins = frozenset(server.allowed_origins)
        self._hosts = frozenset(host_name(origin.partition('://')[2]) for origin in server.allowed_origins if origin != '*')

    def client_of(self, head: RequestHead, address: str) -> str:
        """The name of the key, or the address where none is asked for. Raises GatewayError (401)."""
        if not self._keys:
            return address
        scheme, _, given = head.fields.get(b'authorization', b'').partition(b' ')
        secret = given.strip() if scheme.lower() == b'bearer' else head.fields.get(b'x-api-key', b'')
        owners = [name for name, expected in self._keys if hmac.compare_digest(secret, expected)]   # all of them: time tells nothing
        if not owners:
            raise GatewayError('invalid_api_key', 'the API key is absent or wrong; send one as "Authorization: Bearer …"',
                               headers=['WWW-Authenticate: Bearer'])
        return owners[0]

    def cors(self, head: RequestHead) -> List[str]:
        """The header lines that let a page of an allowed origin see the answer; none for others."""
        origin = head.text(b'origin')
        if not origin or not self._origins.intersection(('*', origin.lower())):
            return []
        return ['Access-Control-Allow-Origin: ' + origin, 'Access-Control-Expose-Headers: X-Request-Id, Retry-After', 'Vary: Origin']

    @staticmethod
    def preflight(head: RequestHead) -> List[str]:
        lines = ['Access-Control-Allow-Methods: GET, HEAD, POST, OPTIONS',
                 'Access-Control-Allow-Headers: ' + (head.text(b'access-control-request-headers') or 'Authorization, Content-Type'),
                 'Access-Control-Max-Age: 600']
        private = b'access-control-request-private-network' in head.fields
        return lines + ['Access-Control-Allow-Private-Network: true'] if private else lines

    def check_origin(self, head: RequestHead) -> None:
        """Refuses pages of strangers. Raises GatewayError (403)."""
        host, origin = head.host.lower(), head.text(b'origin')
        own = ('http://' + re.sub(':80$', '', host), 'https://' + re.sub(':443$', '', host))
        if head.names.count(b'origin') > 1 or not self.cors(head) and origin.lower() not in own:
            raise GatewayError('origin_not_allowed', 'pages of %s may not call this gateway; add it to server.allowed_origins'
                               % (origin[:200] or 'an empty origin'))

    def check_host(self, head: RequestHead) -> None:
        """Refuses DNS rebinding: a stranger's name that leads here. Raises GatewayError (403)."""
        if not (self._keys or '*' in self._origins or is_local_name(head.host) or host_name(head.host) in self._hosts):
            raise GatewayError('host_not_allowed', 'the Host %s is not known here; set server.api_keys, or add its origin '
                               'to server.allowed_origins' % head.host[:200])


# ---------------------------------------------------------------------------------------------
# HTTP front: the listener and its connections


class Connections:
    """The open client connections: who waits, the longest first, and who has a request in progress."""

    def __init__(self, on_all_idle: Callable[[], None]) -> None:
        self._on_all_idle = on_all_idle
        # _lock guards both.
        self._lock = threading.Lock()
        self._idle: 'collections.OrderedDict[ClientConnection, None]' = collections.OrderedDict()
        self._busy: Set[ClientConnection] = set()

    def opened(self, connection: ClientConnection, limit: int) -> bool:
        """Makes room for a new connection; False where all others have a request in progress."""
        evicted = None
        with self._lock:
            if self.count >= limit:
                if not self._idle:
                    return False
                evicted, _ = self._idle.popitem(last=False)
            self._idle[connection] = None
        if evicted:
            shut(evicted.sock)
        return True

    def began(self, connection: ClientConnection) -> None:
        """Its request has arrived whole. Raises ClientGone where it was evicted meanwhile."""
        with self._lock:
            if connection not in self._idle:
                raise ClientGone
            del self._idle[connection]
            self._busy.add(connection)

    def ended(self, connection: ClientConnection) -> None:
        with self._lock:
            if connection not in self._busy:
                return
            self._busy.discard(connection)
            self._idle[connection] = None
            all_idle = not self._busy
        if all_idle:
            self._on_all_idle()

    def closed(self, connection: ClientConnection) -> None:
        self.ended(connection)
        with self._lock:
            self._idle.pop(connection, None)

    @property
    def busy(self) -> int:
        return len(self._busy)

    @property
    def count(self) -> int:
        return len(self._idle) + len(self._busy)


class GatewayParts:
    """What the HTTP front needs of the whole. `config` and `rules` are replaced by a reload."""

    config: Config
    rules: AccessRules
    watchdog: Watchdog
    queue: AdmissionQueue
    upstream: Upstream
    relay: Relay
    metrics: Metrics
    connections: Connections
    closing = False

    def status(self) -> Dict[str, Any]:
        """What /status says."""
        return {'version': __version__, 'engine': self.watchdog.status(), 'queue': self.queue.status(),
                'connections': self.connections.count, 'draining': self.closing, 'now': round(time.time(), 3), **self.metrics.status()}

    def metrics_text(self) -> str:
        """What /metrics says."""
        queue, engine = self.queue.status(), self.watchdog.status()
        build = '{version="%s",python="%s"}' % (__version__, platform.python_version())
        return self.metrics.text() + ''.join([
            metric('gollama_in_flight', 'gauge', 'Requests that hold a slot.', [('', queue['in_flight'])]),
            metric('gollama_waiting', 'gauge', 'Requests that wait for a slot.', [('', queue['waiting'])]),
            metric('gollama_engine_up', 'gauge', '1 when the engine is ready.', [('', int(self.watchdog.ready))]),
            metric('gollama_engine_restarts_total', 'counter', 'Starts of the engine after the first.', [('', engine['restarts'])]),
            metric('gollama_build_info', 'gauge', 'Version of gollama and of Python.', [(build, 1)])])


JSON = 'Content-Type: application/json'
_REQUEST_IDS = itertools.count(1)
_REQUEST_ID_PREFIX = '%x-%x-' % (int(time.time()), os.getpid())     # no getrandom a request


def new_request_id() -> str:
    return _REQUEST_ID_PREFIX + '%x' % next(_REQUEST_IDS)


def render_head(status: int, lines: Sequence[str], reason: Optional[bytes] = None, passed: bytes = b'Server: gollama\r\n') -> bytes:
    """The head of an answer. `reason` and `passed`, further header lines, are the engine's where the answer is."""
    if reason is None:
        reason = http.client.responses[status].encode()
    return b'HTTP/1.1 %d %s\r\n%s\r\n%s\r\n' % (status, reason, '\r\n'.join(lines).encode('latin-1'), passed)


def error_lines(error: GatewayError) -> List[str]:
    lines = [JSON, *error.headers]
    return lines + ['Retry-After: %d' % error.retry_after] if error.retry_after else lines


class GatewayServer(http.server.ThreadingHTTPServer):
    """The listener: a thread for each connection, at most `max_connections` of them."""

    daemon_threads = True
    request_queue_size = 1024       # the default of 5 drops connections in a burst
    allow_reuse_address = POSIX     # elsewhere this option means "share the port"
    allow_reuse_port = False        # two gateways on one port would each get half of the requests

    PAUSE_WITHOUT_DESCRIPTORS = 0.1     # seconds; accept would spin otherwise
    SERVICED_EVERY = 0.4                # seconds; the listener looks up twice a second
    REFUSED_KEPT = 64                   # refused connections that are closed a little later, so that the answer is seen

    def __init__(self, gateway: GatewayParts, handler: Type[socketserver.BaseRequestHandler]) -> None:
        """Raises OSError where the address cannot be had."""
        self.gateway = gateway
        self._refused: Deque[Tuple[float, socket.socket]] = collections.deque()
        self._serviced = 0.0        # monotonic
        host, port = gateway.config.server.addr
        self._dual_stack = not host and socket.has_dualstack_ipv6()
        host = host or ('::' if self._dual_stack else '0.0.0.0')
        self.address_family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        super().__init__(address, handler)     # type: ignore[arg-type]

    def server_bind(self) -> None:
        """Without http.server's look-up of the host's name, which can hang."""
        if self._dual_stack:
            self.socket.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
        socketserver.TCPServer.server_bind(self)
        self.server_name, self.server_port = str(self.server_address[0]), int(self.server_address[1])

    def get_request(self) -> Tuple[socket.socket, Any]:
        try:
            return super().get_request()
        except OSError as error:
            if error.errno in (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM):
                log.error('no connection accepted', error=error.strerror, connections=self.gateway.connections.count)
                time.sleep(self.PAUSE_WITHOUT_DESCRIPTORS)
            raise

    def process_request(self, request: Any, client_address: Any) -> None:
        """A thread for the connection; where there is no room or no thread, a refusal."""
        connections, server = self.gateway.connections, self.gateway.config.server
        address = re.sub('^::ffff:|%.*', '', client_address[0])
        connection = ClientConnection(request, address, server)
        if not connections.opened(connection, server.max_connections):
            return self._refuse(connection, 'all %d connections have a request in progress' % server.max_connections)
        try:
            # threading.Thread would wait until the new one runs: two switches a connection
            _thread.start_new_thread(self.process_request_thread, (request, connection))
        except RuntimeError as error:
            connections.closed(connection)
            self._refuse(connection, str(error))

    def _refuse(self, connection: ClientConnection, why: str) -> None:
        log.warn('connection refused', client=connection.address, why=why)
        error = GatewayError('too_many_connections', 'too many connections: %s; try again soon' % why, 1)
        body, sock = error.body(), connection.sock
        lines = ['Content-Length: %d' % len(body), *error_lines(error), 'X-Request-Id: ' + new_request_id(), 'Connection: close']
        sock.setblocking(False)
        try:
            sock.send(render_head(error.status, lines) + body)
            sock.shutdown(socket.SHUT_WR)
        except OSError:
            pass
        self._refused.append((time.monotonic(), sock))

    def service_actions(self) -> None:
        """After each connection, and twice a second."""
        now = time.monotonic()
        while self._refused and (len(self._refused) > self.REFUSED_KEPT or now - self._refused[0][0] > 1):
            self._refused.popleft()[1].close()
        if now > self._serviced + self.SERVICED_EVERY:      # not after each: the new connection's thread waits for the interpreter lock
            self._serviced = now
            log.flush()
            self.gateway.upstream.pool.expire(EnginePool.SECONDS)

    def handle_error(self, request: Any, client_address: Any) -> None:
        log.exception('internal error in a connection')

    def server_close(self) -> None:
        super().server_close()
        for _, sock in self._refused:
            sock.close()


# ---------------------------------------------------------------------------------------------
# HTTP front: answering

PROBES = ('/healthz', '/livez')     # for monitors: neither a key nor a known Host is asked for
OPEN_PATHS = (*PROBES, '/')         # no key is asked for
METHODS = ('GET', 'HEAD', 'POST')
NO_HEAD = RequestHead(b'GET / HTTP/1.1\r\nHost: -\r\n')     # stands for the head of a request that has not been read

# A JSON parser would recurse as deep as a hostile body likes, on a thread's small stack. Inside a
# JSON string the quotes are escaped, so a prompt cannot look like this.
WANTS_STREAM = re.compile(rb'(?<!\\)"stream"\s*:\s*true')


class Answering(socketserver.BaseRequestHandler):
    """What leaves for a client: the heads of all answers, and what the gateway says on its own account."""

    server: GatewayServer
    client_address: ClientConnection
    next_beat: Deadline

    def setup(self) -> None:
        self.gateway = self.server.gateway
        self.connection = self.client_address
        self.reader = RequestReader(self.connection)

    def begin(self) -> None:
        """A new request. Its configuration is that of its beginning."""
        self.config = self.gateway.config
        self.exchange = Exchange(self.connection, self.gateway.relay, new_request_id())
        self.head = NO_HEAD
        self.body = RequestBody(self.gateway.queue)
        self.cors: List[str] = []
        self.keep_alive = False
        self.unread = True          # bytes of the request are still to come

    def open_answer(self, status: int, lines: Sequence[str], *passed: Any) -> bytes:
        """The commit point: the head of the answer; what follows cannot be another one."""
        exchange = self.exchange
        exchange.head_sent, exchange.status, exchange.first_byte = True, status, time.monotonic()
        self.keep_alive = self.keep_alive and not self.gateway.closing
        lines = [*lines, *self.cors, 'X-Request-Id: ' + exchange.id]
        if not self.keep_alive:
            lines.append('Connection: close')
        elif not self.head.version11:
            lines.append('Connection: keep-alive')
        return render_head(status, lines, *passed)

    def answer(self, status: int, body: bytes, lines: Sequence[str] = (JSON,)) -> None:
        """An answer of the gateway's own."""
        exchange = self.exchange
        exchange.outcome = 'ok' if status < 400 else 'failed' if status in (500, 502) else 'refused'
        self.keep_alive = self.keep_alive and not self.unread
        head = self.open_answer(status, lines if status == 204 else ['Content-Length: %d' % len(body), *lines])
        body = b'' if self.head.method == 'HEAD' else body
        exchange.sent = len(body)
        exchange.send(head + body)

    def answer_error(self, error: GatewayError) -> None:
        exchange = self.exchange
        if not exchange.head_sent:
            return self.answer(error.status, error.body(), error_lines(error))
        self.keep_alive = False
        if not exchange.outcome:        # nothing but heartbeats has left: an error event, and no end mark
            self.send_event(b'data: %s\n\n' % error.body())
        exchange.outcome = 'failed' if error.status in (500, 502) else 'refused'

    def send_event(self, event: bytes, end: bytes = b'') -> None:
        """A piece of an event stream, behind the head of one where it is the first."""
        exchange, chunked = self.exchange, self.head.version11
        head = b''
        if not exchange.head_sent:
            self.keep_alive = self.keep_alive and chunked
            framing = ['Transfer-Encoding: chunked'] if chunked else []
            head = self.open_answer(200, ['Content-Type: text/event-stream', 'Cache-Control: no-cache', 'X-Accel-Buffering: no', *framing])
        exchange.send(head + (chunk(event) + end if chunked else event))
        exchange.sent += len(event)

    def beat(self) -> float:
        """Sends a comment where one is due, so that proxies keep the line open; returns seconds until the next."""
        if self.next_beat.expired:
            self.send_event(b': waiting, position %d\n\n' % self.gateway.queue.position(self.exchange))
            self.next_beat = Deadline(self.config.queue.heartbeat)
        return self.next_beat.remaining()

    def account(self) -> None:
        """The access line and the counters."""
        exchange, seconds = self.exchange, time.monotonic() - self.exchange.started
        if exchange.status is None:
            exchange.status = 499       # nginx's: the client left before an answer
        first = None if exchange.first_byte is None else (exchange.first_byte - exchange.started) * 1000
        record = Record(exchange.id, exchange.client, exchange.method[:20], exchange.path[:200], exchange.status, exchange.outcome,
                        exchange.queue_seconds * 1000, first, seconds * 1000, exchange.sent, exchange.tokens)
        self.gateway.metrics.note(exchange, record, seconds)
        log.line(DEBUG if exchange.path in OWN_PATHS[1:] else INFO, record.pairs(), can_wait=self.gateway.connections.busy > 1)


# Seconds in which the next one gets the interpreter lock. It takes that long to wake up, and who woke it would
# have taken the lock back by then, twice: without it the engine stood idle for a fifth longer.
STAND_ASIDE = 0.0001
HELD_OUTSIDE = 1024 ** 2     # bytes; an answer up to here gives its slot on before its client has taken it: slow clients shall not pile up more


class GatewayHandler(Answering):
    """A client's connection: request after request, each from its head to its log line."""

    def handle(self) -> None:
        self.keep_alive, self.unread = True, False
        while self.keep_alive and self.reader.wait_for_request(Deadline(self.gateway.config.server.idle_timeout)):
            self._serve()
        if self.unread or self.connection.buffer:
            self.reader.linger()

    def finish(self) -> None:
        self.gateway.connections.closed(self.connection)

    def _serve(self) -> None:
        """One request, whatever becomes of it."""
        self.begin()
        try:
            self._respond()
        except ClientGone:
            self.keep_alive = self.unread = False
            self.exchange.outcome = 'cancelled'
        finally:
            self.body.release()
            self.exchange.finish()
            if self.head is not NO_HEAD or self.exchange.status:
                self.account()
            self.gateway.connections.ended(self.connection)

    def _respond(self) -> None:
        try:
            self.head = self.reader.head(Deadline(self.config.server.read_timeout))
            if not self.head.has_body:
                self._complete()
            self._route(self.exchange, self.head, self.gateway.rules)
        except GatewayError as error:
            self.answer_error(error)
        except ClientGone:
            raise
        except Exception:
            log.exception('internal error', id=self.exchange.id)
            self.answer_error(GatewayError('internal_error', 'internal error; the log has more under id ' + self.exchange.id))

    def _complete(self) -> None:
        """The request has arrived whole."""
        self.unread = False
        self.keep_alive = self.head.keep_alive
        self.gateway.connections.began(self.connection)

    def _route(self, exchange: Exchange, head: RequestHead, rules: AccessRules) -> None:
        """The order of refusals is the contract's: 400, 403, 401, 404, 405, 503, 413, 429."""
        exchange.method, exchange.path = head.method, head.path
        given = head.fields.get(b'x-request-id')
        if given and REQUEST_ID.fullmatch(given):
            exchange.id = given.decode()
        forwarded = head.path not in OWN_PATHS and head.path.startswith(self.config.server.forward)
        exchange.counted = forwarded and head.method in METHODS
        from_page = b'origin' in head.fields
        self.cors = rules.cors(head) if from_page else []
        if head.fault:
            raise malformed(head.fault)
        if from_page:
            rules.check_origin(head)
        if head.path not in PROBES:
            rules.check_host(head)
        if head.method == 'OPTIONS' and self.cors:
            return self.answer(204, b'', rules.preflight(head))
        if head.path not in OPEN_PATHS:
            exchange.client = rules.client_of(head, self.connection.address)
        if forwarded:
            self._allow('GET, HEAD, POST')
            self._forward(exchange, head)
        elif head.path in OWN_PATHS:
            self._allow('GET, HEAD')
            self._own_path(head.path)
        else:
            raise GatewayError('not_found', 'there is nothing at %s; the API is under %s'
                               % (head.path[:200], ' '.join(self.config.server.forward)))

    def _allow(self, methods: str) -> None:
        method = self.head.method
        if method not in methods.split(', '):
            raise GatewayError('method_not_allowed', '%s is not allowed here; use %s' % (method[:20], methods),
                               headers=['Allow: ' + methods])

    def _own_path(self, path: str) -> None:
        if path == '/livez' or path == '/healthz' and self.gateway.watchdog.ready and not self.gateway.closing:
            self.answer(200, b'{"status":"ok"}')
        elif path == '/healthz':
            self.answer(503, b'{"status":"engine_not_ready"}')
        elif path == '/status':
            self.answer(200, json.dumps(self.gateway.status(), separators=(',', ':')).encode())
        elif path == '/metrics':
            self.answer(200, self.gateway.metrics_text().encode(), ['Content-Type: text/plain; version=0.0.4; charset=utf-8'])
        else:
            page, policy = status_page()
            self.answer(200, page, ['Content-Type: text/html; charset=utf-8', 'Content-Security-Policy: ' + policy,
                                    'X-Content-Type-Options: nosniff', 'Referrer-Policy: no-referrer', 'Cache-Control: no-cache'])

    def _forward(self, exchange: Exchange, head: RequestHead) -> None:
        """The journey of a request; see the module's docstring."""
        queue, config = self.gateway.queue, self.config
        if self.gateway.closing:
            raise shutting_down()
        if head.length > config.server.max_body:
            raise body_too_large(config.server)
        takes_slot = head.method == 'POST'
        if not self.reader.body_at_once(head, self.body):
            if takes_slot:
                queue.check_room(head.length)
            self.reader.body(head, self.body, config.server)
        if self.unread:
            self._complete()
        exchange.arrived = time.monotonic()
        deadline = Deadline(config.queue.wait_timeout)
        if not takes_slot:
            return self._exchange(exchange, deadline)
        if config.queue.heartbeat and WANTS_STREAM.search(self.body.data):
            self.next_beat = Deadline(config.queue.heartbeat)
            exchange.heartbeat = self.beat
        try:
            queue.admit(exchange, deadline, lambda: self.gateway.watchdog.ready)
        finally:
            exchange.queue_seconds = time.monotonic() - exchange.arrived
        try:
            self._exchange(exchange, deadline)
        finally:
            if queue.release(exchange):
                time.sleep(STAND_ASIDE)

    def _exchange(self, exchange: Exchange, deadline: Deadline) -> None:
        answer = self.gateway.upstream.answer(exchange, self.head, self.body, self.config, deadline)
        # ---- the commit point ----
        exchange.well_answered = answer.head.status < 400
        exchange.outcome = 'ok' if answer.head.status < 500 else 'failed'
        if answer.whole is None:
            try:
                text = self._pass_stream(exchange, answer)
            finally:
                self.gateway.upstream.part(exchange, answer)
        else:
            text = answer.whole
            # the engine is free: the next one need not wait for this client
            handed_over = len(text) <= HELD_OUTSIDE and self.gateway.queue.release(exchange)
            self._pass_whole(exchange, answer.head, text)
            if handed_over:
                time.sleep(STAND_ASIDE)
        read_answer(exchange, text, answer.head.event_stream)

    def _forwarded_head(self, head: AnswerHead, lines: Sequence[str]) -> bytes:
        return self.open_answer(head.status, lines, head.reason, head.passed)

    def _pass_whole(self, exchange: Exchange, head: AnswerHead, body: bytes) -> None:
        if exchange.head_sent:      # with heartbeats
            event = body or b'\n' if head.event_stream else b'data: %s\n\n' % body.replace(b'\r', b'').replace(b'\n', b' ')
            return self.send_event(event, END_OF_CHUNKS)
        data = self._forwarded_head(head, ())
        if len(body) <= SMALL_BODY:
            exchange.send(data + body)
        else:
            exchange.send(data)
            exchange.send(body)
        exchange.sent = len(body)

    def _pass_stream(self, exchange: Exchange, answer: EngineAnswer) -> bytes:
        """The head and what came with it leave at once; the relay copies the rest. Returns the end of what has passed."""
        translate, lines = self._stream_framing(answer)
        body = answer.follower(collect=bool(exchange.heard) or translate == 'decode')
        stream = Stream(exchange, answer.connection.sock, body, translate, answer.head.event_stream)
        data = b'' if exchange.head_sent else self._forwarded_head(answer.head, lines)
        first, answer.connection.buffer = answer.connection.buffer, b''
        try:
            exchange.send(data + (stream.advance(first) if first else b''))
            self._copy_briefly(stream)
            if not stream.ending:
                self._relay(stream)
        finally:
            exchange.sent += stream.sent
        result = stream.result or stream.ending
        if result == 'truncated' and exchange.gone:     # the engine was cut off because the client had left
            result, stream.fault = 'cancelled', ''
        if result != 'ok':
            self.keep_alive, exchange.outcome = False, result
        answer.ended = result == 'ok' and not body.excess
        if stream.fault:
            log.warn('answer broken off', id=exchange.id, why=stream.fault)
        return bytes(stream.recent)

    def _stream_framing(self, answer: EngineAnswer) -> Tuple[str, List[str]]:
        """How the body is translated, and the header lines that say so."""
        lines = ['X-Accel-Buffering: no'] if answer.head.event_stream else []       # nginx would collect the events
        if not self.head.version11:
            self.keep_alive = self.keep_alive and answer.length is not None
            return 'decode' if answer.chunked else 'raw', lines
        if answer.length is not None and not self.exchange.head_sent:
            return 'raw', lines
        return 'raw' if answer.chunked else 'encode', lines + ['Transfer-Encoding: chunked']

    @staticmethod
    def _copy_briefly(stream: Stream) -> None:
        """A lone stream that is over soon wakes no other thread. Among many the relay is better at it."""
        exchange = stream.exchange
        until = Deadline(0.0 if exchange.watched or exchange.relay.is_busy or not DONT_WAIT else BRIEFLY)
        while not stream.ending and not until.expired:
            try:
                data = stream.engine.recv(RECV_SIZE)
            except _WOULD_BLOCK:
                return
            except OSError:
                data = b''
            exchange.send(stream.advance(data))

    @staticmethod
    def _relay(stream: Stream) -> None:
        """Until the relay has copied it to its end."""
        exchange = stream.exchange
        exchange.watched = True
        sockets = () if LINUX else (stream.engine, stream.client)      # there each call says so itself; macOS sends all the same
        for sock in sockets:
            sock.setblocking(False)
        exchange.relay.post(exchange.relay.copy, stream)
        stream.wait()
        for sock in sockets:
            sock.setblocking(True)


# ---------------------------------------------------------------------------------------------
# Demo engine

DEMO_TEXT = ('This is the demo engine of gollama, not a language model. It stands in for llama-server so that you can see the gateway '
             'at work: each of these words is sent as one token. Put a llama-server and a model into config.json to hear a real answer.')
DEMO_TOKENS = 32            # where a request has no max_tokens
DEMO_DELAY = 'GOLLAMA_DEMO_DELAY'   # environment: seconds a token
DEMO_PAGES = {'/health': {'status': 'ok'}, '/props': {'total_slots': 1024, 'model_path': 'demo'},
              '/v1/models': {'object': 'list', 'data': [{'id': 'demo', 'object': 'model', 'owned_by': 'gollama'}]}}


def completion(kind: str, choice: Dict[str, Any], usage: Dict[str, Any]) -> Dict[str, Any]:
    choices = [{'index': 0, **choice}]
    return {'id': 'chatcmpl-demo', 'created': int(time.time()), 'model': 'demo', 'object': kind, 'choices': choices, **usage}


class DemoHandler(http.server.BaseHTTPRequestHandler):
    """Speaks like llama-server, as far as a newcomer's curl and an integrator's client go."""

    protocol_version = 'HTTP/1.1'
    server_version = 'gollama-demo'
    disable_nagle_algorithm = True
    wbufsize = -1       # head and body leave together

    def log_message(self, format: str, *args: object) -> None:
        """No access log: the gateway has one."""

    def do_GET(self) -> None:
        if self.path not in DEMO_PAGES:
            return self._refuse(404, 'not found')
        self._answer(200, DEMO_PAGES[self.path])

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get('Content-Length') or 0))
        if self.path != '/v1/chat/completions':
            return self._refuse(404, 'the demo engine only knows /v1/chat/completions')
        try:
            question = json.loads(body)
            count = max(1, min(int(question.get('max_tokens') or DEMO_TOKENS), 100000))
        except (ValueError, TypeError, AttributeError, OverflowError, RecursionError):
            return self._refuse(400, 'the body is not a JSON object')
        prompt = len(body.split())
        usage = {'usage': {'prompt_tokens': prompt, 'completion_tokens': count, 'total_tokens': prompt + count}}
        if question.get('stream') is True:
            return self._stream(count, usage)
        message = {'role': 'assistant', 'content': ''.join(self._words(count))}
        self._answer(200, completion('chat.completion', {'message': message, 'finish_reason': 'length'}, usage))

    def _words(self, count: int) -> Iterator[str]:
        delay = float(os.environ.get(DEMO_DELAY) or 0.05)
        for word in itertools.islice(itertools.cycle(DEMO_TEXT.split()), count):
            if delay:
                time.sleep(delay)
            yield word + ' '

    def _stream(self, count: int, usage: Dict[str, Any]) -> None:
        self._head(200, 'text/event-stream', 'Transfer-Encoding', 'chunked')
        for word in self._words(count):
            self._event({'delta': {'content': word}, 'finish_reason': None}, {})
        self._event({'delta': {}, 'finish_reason': 'length'}, usage)
        self.wfile.write(chunk(b'data: [DONE]\n\n') + END_OF_CHUNKS)

    def _event(self, choice: Dict[str, Any], usage: Dict[str, Any]) -> None:
        event = json.dumps(completion('chat.completion.chunk', choice, usage))
        self.wfile.write(chunk(b'data: %s\n\n' % event.encode()))
        self.wfile.flush()

    def _head(self, status: int, content_type: str, name: str, value: str) -> None:
        self.send_response(status)
        self.send_header('Content-Type', content_type)
        self.send_header(name, value)
        self.end_headers()

    def _answer(self, status: int, value: object) -> None:
        body = json.dumps(value).encode()
        self._head(status, 'application/json', 'Content-Length', str(len(body)))
        self.wfile.write(body)

    def _refuse(self, status: int, message: str) -> None:
        self._answer(status, {'error': {'message': message, 'type': 'invalid_request_error', 'code': status}})


class DemoServer(socketserver.ThreadingTCPServer):
    """The demo engine's listener; http.server's would look up the host's name, which can hang."""

    daemon_threads = True
    allow_reuse_address = POSIX
    request_queue_size = 1024

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that left in mid-stream: nothing to say."""


def run_demo_engine(host: str, port: int) -> int:
    """Serves until it is killed."""
    with DemoServer((host, port), DemoHandler) as server, contextlib.suppress(KeyboardInterrupt):
        print('demo engine: server is listening on http://%s' % bracketed(host, server.server_address[1]), flush=True)
        server.serve_forever()
    return 0


def demo_config(config: Config, port: int) -> Config:
    """The same, with the demo engine in place of the engine."""
    engine = dataclasses.replace(config.engine, bin=sys.executable, args=(os.path.abspath(__file__), '--demo-engine'),
                                 base_url=('127.0.0.1', port), api_key=None, health_path='/health')
    return dataclasses.replace(config, engine=engine)


# ---------------------------------------------------------------------------------------------
# Gateway


class Notifier:
    """Tells systemd (sd_notify) where NOTIFY_SOCKET says; nothing where it does not."""

    def __init__(self) -> None:
        self._address = re.sub('^@', '\0', os.environ.get('NOTIFY_SOCKET', ''))
        self._order = threading.Lock()      # held while telling: no RELOADING=1 before the first READY=1, nor lost after it
        self._was_ready = False
        self._extended = -math.inf      # when more time to start was asked for, monotonic

    def tell(self, *lines: str) -> None:
        if not self._address:
            return
        try:
            with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
                sock.sendto('\n'.join(lines).encode(), self._address)
        except OSError as error:
            log.warn('systemd cannot be told', error=str(error))

    def ready(self) -> None:
        with self._order:
            self.tell(*([] if self._was_ready else ['READY=1']), 'STATUS=ready')
            self._was_ready = True

    def sign_of_life(self, start_timeout: float) -> None:
        """While it starts for the first time: as long again as the engine may be silent."""
        if not self._was_ready and time.monotonic() - self._extended > 1:
            self._extended = time.monotonic()
            self.tell('EXTEND_TIMEOUT_USEC=%d' % ((min(start_timeout, 86400) + 15) * 1e6), 'STATUS=the engine is loading')

    def reloaded(self) -> None:
        with self._order:
            if self._was_ready:
                self.tell('RELOADING=1', 'MONOTONIC_USEC=%d' % (time.monotonic() * 1e6))
                self.tell('READY=1', 'STATUS=reloaded')


class Mailbox:
    """What the main thread waits for: signals, and other threads that have something for it to look at.

    A signal handler may neither lock nor log, and a wait on a queue lost 41 of 20,000 wake-ups:
    the interpreter writes the signal's number into a socket instead (signal.set_wakeup_fd).
    """

    def __init__(self) -> None:
        self._reader, self._writer = socket.socketpair()
        self._writer.setblocking(False)
        self._caught: List[int] = []

    def catch(self, *names: str) -> None:
        """From now on these signals arrive here; only in the main thread."""
        signal.set_wakeup_fd(self._writer.fileno(), warn_on_full_buffer=False)
        self._caught = [getattr(signal, name) for name in names if hasattr(signal, name)]
        for number in self._caught:
            signal.signal(number, lambda signum, frame: None)

    def wake(self) -> None:
        with contextlib.suppress(OSError):      # full: it wakes anyway
            self._writer.send(b'\0')

    def wait(self, seconds: float) -> str:
        """The name of a signal; '' where another thread woke it, or the time is over."""
        self._reader.settimeout(None if math.isinf(seconds) else max(seconds, 0.001))
        try:
            number = self._reader.recv(1)[0]
        except socket.timeout:
            return ''
        return signal.Signals(number).name if number else ''

    def close(self) -> None:
        """Signals are ignored from now on: an interpreter that ends would give them their default action back."""
        for number in self._caught:
            signal.signal(number, signal.SIG_IGN)
        signal.set_wakeup_fd(-1)
        self._reader.close()
        self._writer.close()


class Gateway(GatewayParts, WatchdogListener):
    """The whole: builds the parts, starts them, reloads, drains, stops."""

    CUT_SHOWS_WITHIN = 2.0      # seconds for the answers that a stop cuts to say so

    def __init__(self, config: Config, load: Callable[[], Config]) -> None:
        """`load` reads the configuration again, for a reload. Raises OSError where the address cannot be had."""
        self._load = load
        self._failure = ''
        self._mailbox = Mailbox()
        self._notifier = Notifier()
        self.connections = Connections(self.all_idle)
        self.relay = Relay()
        self.metrics = Metrics()
        self.queue = AdmissionQueue(config.queue)
        self.watchdog = Watchdog(config.engine, config.server.drain_timeout, self)
        self.upstream = Upstream(self.watchdog)
        self._adopt(config)
        self._server = GatewayServer(self, GatewayHandler)
        self._addr = config.server.addr
        host = '127.0.0.1' if self._addr[0] in ('', '0.0.0.0', '::') else self._addr[0]
        self._url = 'http://' + bracketed(host, self._server.server_port)       # for a person on this machine

    def _adopt(self, config: Config) -> None:
        self.config = config
        self.rules = AccessRules(config.server)
        self.relay.write_timeout = config.server.write_timeout
        for warning in config_warnings(config):
            log.warn(warning)

    def run(self) -> int:
        """Serves until a signal; returns the exit code."""
        self.relay.start()
        threading.Thread(target=self._server.serve_forever, name='accept', daemon=True).start()
        self._mailbox.catch('SIGTERM', 'SIGINT', 'SIGHUP')
        say('gollama %s listens on %s' % (__version__, self._url))
        log.info('listening', addr=bracketed(self._addr[0] or '*', self._server.server_port), version=__version__)
        self.watchdog.start()
        try:
            while not self._failure:
                told = self._mailbox.wait(math.inf)
                if told == 'SIGHUP':
                    self._reload()
                elif told:
                    self._drain_and_stop(told)
                    return 0
            say('gollama: ' + self._failure, sys.stderr)
            return 1
        finally:
            self._end()

    def _drain_and_stop(self, told: str) -> None:
        """No new requests, those waiting are refused, those in flight get drain_timeout; a second signal ends it all."""
        self.closing = True
        self._notifier.tell('STOPPING=1', 'STATUS=draining')
        log.info('stopping', signal=told, in_flight=self.connections.busy)
        self.queue.close()
        self.watchdog.gate.close()
        if self.connections.busy:
            say('stopping: %d requests are in progress, waiting for them (Ctrl-C again: stop at once)' % self.connections.busy)
        if self._wait_for(self._is_idle, self.config.server.drain_timeout):
            self.watchdog.stop()
            say('stopping the engine')
            if self._wait_for(self.watchdog.ended.is_set, math.inf):
                self._wait_for(self._is_idle, self.CUT_SHOWS_WITHIN)

    def _is_idle(self) -> bool:
        return not self.connections.busy

    def _wait_for(self, done: Callable[[], bool], seconds: float) -> bool:
        """Until it is done, or the time is over. False where a second signal came."""
        deadline = Deadline(seconds)
        while not done() and not deadline.expired:
            if self._mailbox.wait(deadline.remaining()) in ('SIGTERM', 'SIGINT'):
                return False
        return True

    def _end(self) -> None:
        """What was not stopped politely is killed."""
        self._server.server_close()     # its thread may wait half a second in poll; it ends with the process
        self.watchdog.stop(kill=True)
        self.watchdog.ended.wait(5)
        self.relay.close()
        self.relay.join(1)
        self.upstream.pool.expire(-1)
        self._mailbox.close()
        if self.closing:
            say('stopped')
            log.info('stopped')

    def _reload(self) -> None:
        try:
            config = self._load()
            engine_command(config.engine)
            log.configure(config.logger)
        except (ConfigError, OSError) as error:
            for problem in error.problems if isinstance(error, ConfigError) else ['logger.log-path: %s' % error]:
                log.error('the configuration is bad, nothing was changed', problem=problem)
            return
        if config.server.addr != self._addr:
            log.warn('server.addr has changed: this needs a restart')
        self._adopt(config)
        self.queue.reconfigure(config.queue)
        restarts = self.watchdog.reconfigure(config.engine, config.server.drain_timeout)
        log.info('configuration reloaded', engine='restarts' if restarts else 'unchanged')
        self._notifier.reloaded()

    # -- told by others, in their threads

    def all_idle(self) -> None:
        if self.closing:
            self._mailbox.wake()

    def engine_changed(self, state: EngineState, detail: str) -> None:
        generation = self.watchdog.gate.generation      # 0: none has been ready yet
        if state is EngineState.STARTING:
            say('starting the engine (%s) and waiting until its model is loaded' % detail)
            self.sign_of_life()
        elif state is EngineState.READY:
            self._notifier.ready()
            again, hint = (' again', '') if generation > 1 else ('', self._hint())
            say('the engine is ready%s after %s s%s' % (again, detail, hint))
            slots, wanted = self.watchdog.slots(), self.config.queue.max_concurrency
            if slots is not None and slots < wanted:
                log.warn('queue.max_concurrency is more than the slots of the engine: the rest waits inside the engine',
                         max_concurrency=wanted, slots=slots)
        elif state in (EngineState.DIED, EngineState.HUNG) and generation:
            say('the engine %s (%s); it is started again' % (state.value, detail.partition('\n')[0]))
            self._notifier.tell('STATUS=the engine %s, restarting' % state.value)

    def _hint(self) -> str:
        key = "-H 'Authorization: Bearer YOUR_KEY' " if self.config.server.api_keys else ''
        return '; try it:\n  curl %s/v1/chat/completions %s-d \'{"messages": [{"role": "user", "content": "Hello"}]}\'' % (self._url, key)

    def sign_of_life(self) -> None:
        self._notifier.sign_of_life(self.config.engine.start_timeout)

    def engine_failed_to_start(self, message: str) -> None:
        self._failure = message
        self._mailbox.wake()

    def watchdog_ended(self) -> None:
        self._mailbox.wake()


# ---------------------------------------------------------------------------------------------
# Command line


def make_parser() -> argparse.ArgumentParser:
    keys = ['  %-26s %s (default %s)' % (k.path, k.doc, json.dumps(k.default)) for k in CONFIG_KEYS]
    codes = 'exit codes: 0 stopped on request, 1 could not start or failed, 2 bad usage or configuration'
    parser = argparse.ArgumentParser(
        prog='gollama.py', add_help=False, usage='python gollama.py [--config FILE] [--demo] [--check]',
        description='A gateway in front of one local llama-server: starts it, keeps it alive, queues and forwards the OpenAI API.',
        epilog='\n'.join(['configuration keys:', *keys, '', codes]),
        formatter_class=lambda prog: argparse.RawDescriptionHelpFormatter(prog, width=120))
    group = parser.add_argument_group('options')
    group.add_argument('--config', metavar='FILE', help='the configuration (default config.json)')
    group.add_argument('-config', dest='config', default=argparse.SUPPRESS, help=argparse.SUPPRESS)
    group.add_argument('--demo', action='store_true', help='use the built-in demo engine in place of engine.bin and engine.args')
    group.add_argument('--check', action='store_true', help='check the configuration, print the engine command, start nothing')
    group.add_argument('--version', action='version', version='gollama ' + __version__, help='print the version')
    group.add_argument('--help', '-h', action='help', help='print this')
    group.add_argument('--demo-engine', action='store_true', help=argparse.SUPPRESS)
    group.add_argument('--host', default='127.0.0.1', help=argparse.SUPPRESS)
    group.add_argument('--port', default=0, type=int, help=argparse.SUPPRESS)
    return parser


def free_loopback_port() -> int:
    """A port that was free a moment ago."""
    with socket.create_server(('127.0.0.1', 0)) as sock:
        return int(sock.getsockname()[1])


def read_config(path: Optional[str], demo_port: int) -> Config:
    """The configuration, at the start and for a reload; with a port, that of a demo."""
    without_file = demo_port and path is None and not os.path.exists('config.json')
    config = parse_config({}, demo=True) if without_file else load_config(path or 'config.json', bool(demo_port))
    return demo_config(config, demo_port) if demo_port else config


def run_gateway(config: Config, load: Callable[[], Config]) -> int:
    """Runs a gateway; returns the exit code. Raises ConfigError."""
    try:
        log.configure(config.logger)
    except OSError as error:
        raise ConfigError(['logger.log-path: %s; choose another place' % error]) from None
    with contextlib.suppress(ImportError, ValueError, OSError):     # Windows, or not allowed
        import resource     # a request can need two descriptors; the usual soft limit of 1024 is soon used up
        _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        resource.setrlimit(resource.RLIMIT_NOFILE, (65536 if hard == resource.RLIM_INFINITY else min(hard, 65536), hard))
    threading.stack_size(1024 * 1024)       # address space for each thread; only what is touched is memory
    try:
        gateway = Gateway(config, load)
    except OSError as error:
        say('gollama: cannot listen on %s: %s; choose another server.addr, or end what uses it'
            % (bracketed(*config.server.addr), error.strerror or error), sys.stderr)
        return 1
    try:
        return gateway.run()
    finally:
        log.flush(patience=1)


def main(argv: Optional[Sequence[str]] = None) -> int:
    """The program; returns its exit code."""
    options = make_parser().parse_args(argv)
    if options.demo_engine:
        return run_demo_engine(options.host, options.port)
    load = functools.partial(read_config, options.config, free_loopback_port() if options.demo else 0)
    try:
        config = load()
        command = engine_command(config.engine)
        if not options.check:
            return run_gateway(config, load)
    except ConfigError as error:
        say('\n'.join('gollama: ' + problem for problem in error.problems), sys.stderr)
        return 2
    warnings = ['warning: ' + warning for warning in config_warnings(config)]
    say('\n'.join(['the configuration is good; the engine would be started as', '  ' + masked(command), *warnings]))
    return 0


if __name__ == '__main__':
    sys.exit(main())
