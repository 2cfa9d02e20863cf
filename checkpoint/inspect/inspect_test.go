package inspect

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/pageferry/pageferry/internal/testutil"
	"github.com/pageferry/pageferry/proc"
)

func TestMain(m *testing.M) { testutil.Main(m) }

// inspect looks at a program that may just have been started.
func inspect(t testing.TB, pid int, opt Options) *Report {
	t.Helper()
	r, err := Inspect(pid, opt)
	if err != nil {
		t.Fatal(err)
	}
	return r
}

// begin starts a program from a shell that first closes what the test process
// itself was started with.
func begin(t testing.TB, command string) *testutil.Process {
	t.Helper()
	const close = "for f in /proc/self/fd/*; do f=${f##*/}; [ $f -gt 2 ] && eval \"exec $f>&-\" 2>/dev/null; done; "
	return testutil.StartCmd(t, exec.Command("/bin/bash", "-c", close+command), time.Minute)
}

// wantRefusal looks for a refusal that says all of these.
func wantRefusal(t testing.TB, r *Report, parts ...string) {
	t.Helper()
	for _, s := range r.Refusals() {
		if !slices.ContainsFunc(parts, func(p string) bool { return !strings.Contains(s, p) }) {
			return
		}
	}
	t.Errorf("no refusal says %q: %q", parts, r.Refusals())
}

func TestRedis(t *testing.T) {
	testutil.Require(t, testutil.Root, testutil.Program("redis-server"))
	dir := t.TempDir()
	p := begin(t, "cd "+dir+" && exec redis-server --port 0 --unixsocket "+dir+"/redis.sock --save ''")
	testutil.Eventually(t, 10*time.Second, func() error {
		// It listens before it has made its background threads.
		if tids, err := proc.Threads(p.Pid()); err != nil || len(tids) < 4 {
			return fmt.Errorf("%d threads (%v)", len(tids), err)
		}
		_, err := os.Stat(dir + "/redis.sock")
		return err
	})
	r := inspect(t, p.Pid(), Options{})
	if !r.Movable {
		t.Errorf("redis cannot move: %q", r.Refusals())
	}
	if r.Comm != "redis-server" || len(r.Threads) < 4 || r.MemoryBytes < 1<<20 || r.MemoryBytes > 1<<30 {
		t.Errorf("%q with %d threads and %d bytes", r.Comm, len(r.Threads), r.MemoryBytes)
	}
	if !slices.Contains(r.MappedFiles, r.Exe) || slices.Contains(r.Files, r.Exe) || !slices.Contains(r.Directories, dir) {
		t.Errorf("files %q, mapped %q, directories %q", r.Files, r.MappedFiles, r.Directories)
	}
	var text bytes.Buffer
	if err := r.Text(&text); err != nil {
		t.Fatal(err)
	}
	for _, want := range []string{"can move", "epoll", dir + "/redis.sock", "anonymous"} {
		if !strings.Contains(text.String(), want) {
			t.Errorf("the text does not say %q:\n%s", want, text.String())
		}
	}
	b, err := json.Marshal(r)
	if err != nil {
		t.Fatal(err)
	}
	for _, want := range []string{`"movable":true`, `"memory_bytes":`, `"fds":[`, `"listeners":[]`} {
		if !strings.Contains(string(b), want) {
			t.Errorf("the JSON does not have %s", want)
		}
	}
}

func TestMemcached(t *testing.T) {
	testutil.Require(t, testutil.Root, testutil.Program("memcached"))
	dir := t.TempDir()
	p := begin(t, "exec memcached -u root -s "+dir+"/m.sock")
	testutil.Eventually(t, 10*time.Second, func() error {
		_, err := os.Stat(dir + "/m.sock")
		return err
	})
	if r := inspect(t, p.Pid(), Options{}); !r.Movable {
		t.Errorf("memcached cannot move: %q", r.Refusals())
	}
}

// TestRefusals starts processes that cannot move.
func TestRefusals(t *testing.T) {
	testutil.Require(t, testutil.Root, testutil.Program("python3"))
	for _, c := range []struct {
		name, program string
		want          []string
	}{
		{"child", "import os,time\nif os.fork()==0: time.sleep(100)", []string{"child", "trees"}},
		{"pipe", "import os\nr,w=os.pipe()\nif os.fork()==0:\n os.setsid()\n os.close(r)\n import time;time.sleep(100)\nos.close(w)", []string{"descriptor", "held outside"}},
		{"shared pipe", "import os\nr,w=os.pipe()\nif os.fork()==0:\n import time;time.sleep(100)", []string{"descriptor", "shared with"}},
		{"deleted mapping", "import mmap,os\nf=open('gone','w+b');f.write(b'x'*8192);f.flush()\nm=mmap.mmap(f.fileno(),8192)\nos.unlink('gone')", []string{"mapping", "deleted"}},
		{"tcp", "import socket\nl=socket.socket();l.bind(('127.0.0.1',0));l.listen()\nc=socket.create_connection(l.getsockname())", []string{"established", "--tcp close"}},
		{"packet socket", "import socket\ns=socket.socket(socket.AF_PACKET,socket.SOCK_RAW)", []string{"a packet socket"}},
		{"multicast", "import socket,struct\ns=socket.socket(socket.AF_INET,socket.SOCK_DGRAM)\ns.setsockopt(0,35,socket.inet_aton('239.1.2.3')+socket.inet_aton('127.0.0.1'))", []string{"239.1.2.3"}},
		{"terminal", "import os\na,b=os.openpty()", []string{"a terminal"}},
		{"huge device", "import os\nf=os.open('/dev/kmsg',os.O_RDONLY)", []string{"device 1:11"}},
		{"pidfd", "import os\nf=os.pidfd_open(os.getpid())", []string{"pidfd"}},
		{"replaced file", "import os\nf=open('a','w')\nopen('b','w')\nos.rename('b','a')\nos.link('/proc/self/fd/%d'%f.fileno(),'c',follow_symlinks=True) if 0 else None\ng=open('d','w');os.link('d','e');os.rename('a','d')", []string{"descriptor", "deleted under this name"}},
		{"unix peer", "import socket,os\na,b=socket.socketpair()\nif os.fork()==0:\n a.close()\n import time;time.sleep(100)\nb.close()", []string{"outside of the process"}},
		{"rights", "import socket,os\na,b=socket.socketpair()\nsocket.send_fds(a,[b'x'],[1])", []string{"in flight"}},
		{"chroot", "import os\nos.mkdir('r');os.chroot('r')", []string{"chroot"}},
		{"namespace", "import ctypes\nctypes.CDLL(None).unshare(0x08000000)", []string{"namespace ipc"}},
		{"seccomp", "import ctypes\nl=ctypes.CDLL(None)\nimport struct\np=ctypes.create_string_buffer(struct.pack('HBBI',6,0,0,0x7fff0000))\nf=ctypes.create_string_buffer(struct.pack('H6xQ',1,ctypes.addressof(p)))\nl.prctl(38,1,0,0,0)\nassert l.prctl(22,2,f,0,0)==0", []string{"seccomp"}},
		{"sysv", "import ctypes\nl=ctypes.CDLL(None)\ni=l.shmget(0,4096,0o1600)\nl.shmat.restype=ctypes.c_void_p\nl.shmat(i,None,0)\nl.shmctl(i,0,None)", []string{"System V"}},
		{"traced", "import ctypes,os,signal,time\nl=ctypes.CDLL(None)\np=os.getpid()\nl.prctl(0x59616d61,-1,0,0,0)\nif os.fork()==0:\n l.ptrace(0x4206,p,0,0)\n open('done','w')\n time.sleep(100)\nwhile not os.path.exists('done'): time.sleep(0.01)", []string{"is traced by process"}},
	} {
		t.Run(c.name, func(t *testing.T) {
			testutil.NoLeaks(t)
			dir := t.TempDir()
			file := dir + "/p.py"
			if err := os.WriteFile(file, []byte("import os\nos.chdir('"+dir+"')\nro=open('ready.tmp','w')\n"+c.program+
				"\nimport time\nro.write('r');ro.close()\ntime.sleep(100)\n"), 0o600); err != nil {
				t.Fatal(err)
			}
			p := begin(t, "exec python3 "+file)
			testutil.Eventually(t, 20*time.Second, func() error {
				if !p.Alive() {
					t.Fatalf("the program ended: %s", p.Text())
				}
				b, err := os.ReadFile(dir + "/ready.tmp")
				if err == nil && len(b) == 0 {
					err = errors.New("not ready")
				}
				return err
			})
			r := inspect(t, p.Pid(), Options{})
			wantRefusal(t, r, c.want...)
			if r.Movable {
				t.Error("it is said to be movable")
			}
		})
	}
}

func TestNotAProcess(t *testing.T) {
	testutil.Require(t, testutil.Root)
	if _, err := Inspect(1<<22, Options{}); !errors.Is(err, ErrNoProcess) {
		t.Errorf("no process: %v", err)
	}
	if _, err := Inspect(2, Options{}); !errors.Is(err, ErrKernelThread) {
		t.Errorf("kernel thread: %v", err)
	}
	wantRefusal(t, inspect(t, os.Getpid(), Options{}), "pageferry itself")
	wantRefusal(t, inspect(t, 1, Options{}), "init of this host")
}

func TestUnit(t *testing.T) {
	path, unit := parseCgroups("9:name=systemd:/system.slice/redis.service\n1:cpu:/\n0::/system.slice/redis.service/sub\n")
	if path != "/system.slice/redis.service/sub" || unit != "redis.service" {
		t.Errorf("%q %q", path, unit)
	}
	for _, c := range []struct {
		restart     string
		main        string
		kill, exit0 bool
	}{
		{"no", "7", false, false}, {"always", "7", true, true}, {"on-failure", "7", true, false},
		{"on-success", "7", false, true}, {"always", "8", false, false},
	} {
		var u Unit
		u.parse("MainPID="+c.main+"\nRestart="+c.restart+"\n", 7)
		if u.RestartsOnKill != c.kill || u.RestartsOnExit0 != c.exit0 {
			t.Errorf("%+v gives %+v", c, u)
		}
	}
}

func FuzzSmaps(f *testing.F) {
	b, err := os.ReadFile("/proc/self/smaps")
	if err != nil {
		f.Fatal(err)
	}
	f.Add(b)
	f.Add([]byte("Rss: 4 kB\n1-2 r--p:\nRss: 4 kB\nSwap: 99999999999999999999 kB\n"))
	f.Fuzz(func(t *testing.T, b []byte) {
		parseSizes(b)
		parseCgroups(string(b))
		new(Unit).parse(string(b), 1)
	})
}
