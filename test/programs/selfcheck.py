"""A Python program that checks itself: dictionaries, generators, threads,
timers, signals, epoll. It is silent while
all is well; at the first violation it says what is wrong and exits with 1; on
SIGTERM it verifies everything once more, says "ok" and exits with 0."""

import argparse
import hashlib
import os
import queue
import random
import select
import signal
import socket
import sys
import threading
import time

parser = argparse.ArgumentParser()
parser.add_argument("--entries", type=int, default=20000)
parser.add_argument("--heartbeat", default="")
parser.add_argument("--identity", default="selfcheck")
parser.add_argument("--report", default="")
parser.add_argument("--beat-ms", type=float, default=5)
opt = parser.parse_args()

stopping = threading.Event()


class Beater:
    """Heartbeats: "beat IDENTITY COUNTER NONCE TEXT", see testutil's Recorder."""

    def __init__(self):
        self.lock = threading.Lock()
        self.counter = 0
        kind, _, addr = opt.heartbeat.partition(":")
        if kind == "unix":
            self.family, self.addr = socket.AF_UNIX, addr
        elif kind == "udp":
            host, _, port = addr.rpartition(":")
            self.family, self.addr = socket.AF_INET, (host, int(port))
        else:
            self.family = None

    def send(self, text):
        if self.family is None:
            return
        with self.lock:
            self.counter += 1
            line = f"beat {opt.identity} {self.counter} {os.urandom(8).hex()} {text}"
            s = socket.socket(self.family, socket.SOCK_DGRAM)
            try:
                s.setblocking(False)
                s.sendto(line.encode(), self.addr)
            except OSError:
                pass
            finally:
                s.close()

    def run(self):
        last, longest = time.monotonic_ns(), 0
        while not stopping.wait(opt.beat_ms / 1000):
            now = time.monotonic_ns()
            if now < last:
                bad(f"the monotonic clock went back by {last - now} ns")
            longest = max(longest, now - last)
            last = now
            self.send(f"gap {longest}")


beater = Beater()


def tell(text):
    print(text, flush=True)
    if opt.report:
        with open(opt.report, "a") as f:
            print(text, file=f)


def bad(text):
    tell("bad " + text)
    beater.send("bad " + text)
    os._exit(1)


def value(key, generation):
    return hashlib.md5(f"{key}/{generation}".encode()).hexdigest() * (1 + key % 7)


table = {k: value(k, 0) for k in range(opt.entries)}
generations = dict.fromkeys(range(opt.entries), 0)
guard = threading.Lock()


def churn():
    rng = random.Random(1)
    while not stopping.wait(0.005):
        with guard:
            for _ in range(40):
                k = rng.randrange(opt.entries)
                if table[k] != value(k, generations[k]):
                    bad(f"entry {k} changed")
                generations[k] += 1
                table[k] = value(k, generations[k])


def fibonacci():
    """A generator that lives across the move."""
    a, b = 0, 1
    while True:
        yield a
        a, b = b, (a + b) % (1 << 521)


def generators():
    a, b = fibonacci(), fibonacci()
    last = next(b)
    while not stopping.wait(0.004):
        x, y = next(a), last
        last = next(b)
        if x != y:
            bad("two generators of one series disagree")


def producer(q):
    n = 0
    while not stopping.wait(0.004):
        q.put(n)
        n += 1
    q.put(None)


def consumer(q):
    want = 0
    while True:
        n = q.get()
        if n is None:
            return
        if n != want:
            bad(f"{n} came out of a queue, not {want}")
        want += 1


def poller():
    r, w = os.pipe()
    p = select.epoll()
    p.register(r, select.EPOLLIN)
    n = 0
    while not stopping.is_set():
        if p.poll(0.01):
            bad("an empty pipe is readable")
        os.write(w, bytes([n & 255]))
        if [fd for fd, _ in p.poll(10)] != [r] or os.read(r, 1)[0] != n & 255:
            bad("what went into a pipe did not come out")
        n += 1
    p.close()
    os.close(r)
    os.close(w)


alarms = 0


def on_alarm(*_):
    global alarms
    alarms += 1


def verify():
    with guard:
        for k, v in table.items():
            if v != value(k, generations[k]):
                bad(f"entry {k} changed")


def main():
    signal.signal(signal.SIGTERM, lambda *_: stopping.set())
    signal.signal(signal.SIGALRM, on_alarm)
    signal.setitimer(signal.ITIMER_REAL, 0.02, 0.02)
    q = queue.Queue()
    bodies = [beater.run, churn, generators, lambda: producer(q), lambda: consumer(q), poller]
    threads = [threading.Thread(target=b) for b in bodies]
    for t in threads:
        t.start()
    print("ready", flush=True)
    seen, rounds = 0, 0
    while not stopping.wait(0.05):
        rounds += 1
        if rounds % 200 == 0:
            if alarms == seen:
                bad("ITIMER_REAL does not fire any more")
            seen = alarms
    signal.setitimer(signal.ITIMER_REAL, 0)
    for t in threads:
        t.join()
    verify()
    tell("ok")
    beater.send("ok")


try:
    main()
except Exception as e:  # whatever Python itself notices
    bad(f"{type(e).__name__}: {e}")
sys.exit(0)
