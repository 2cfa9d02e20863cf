package restore

import (
	"testing"

	"github.com/pageferry/pageferry/internal/testutil"
)

func TestRedis(t *testing.T) {
	require(t)
	testutil.NoLeaks(t)
	r := testutil.RedisWith(t, testutil.RedisConfig{TCP: true})
	r.Populate(20000, 200)
	want := r.Digest()
	for range 3 {
		trap := move(t, r.Process, nil)
		r.Ping()
		if got := r.Digest(); got != want {
			t.Fatalf("its data has digest %s, want %s", got, want)
		}
		if trap.faults.Load() == 0 {
			t.Error("no page came on demand")
		}
		trap.resident(t)
		r.Do("SET", "after", "it")
		want = r.Digest()
	}
}

func TestMemcached(t *testing.T) {
	require(t)
	testutil.NoLeaks(t)
	m := testutil.MemcachedTCP(t)
	m.Populate(500, 1000)
	trap := move(t, m.Process, nil)
	m.Verify(500, 1000)
	trap.resident(t)
}

func TestSelfCheckingPrograms(t *testing.T) {
	require(t)
	for name, start := range map[string]func(testing.TB, testutil.ProgramConfig) *testutil.SelfChecking{
		"everything": testutil.StartEverything, "go": testutil.StartGo, "python": testutil.StartPython,
	} {
		t.Run(name, func(t *testing.T) {
			testutil.NoLeaks(t)
			rec := testutil.NewRecorder(t)
			p := start(t, testutil.ProgramConfig{Recorder: rec})
			for range 3 {
				trap := move(t, p.Process, nil)
				p.Beat(3)
				p.Check()
				trap.resident(t)
				p.Beat(3)
				p.Check()
			}
			p.Verify()
			rec.OneOwner(3)
		})
	}
}
