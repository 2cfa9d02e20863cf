package bulk

import (
	"testing"

	"github.com/pageferry/pageferry/appliance"
)

func TestFits(t *testing.T) {
	redis := appliance.ProcessInfo{PID: 42, Command: "/usr/bin/redis-server /etc/redis.conf", UID: 105, User: "redis",
		Cgroup: "/system.slice/redis.service/shard-1", Unit: "redis.service", Labels: map[string]string{"tier": "cache", "empty": ""}}
	for _, c := range []struct {
		s    Selector
		want bool
	}{
		{Selector{Host: "a", PID: 42}, true},
		{Selector{Host: "b", PID: 42}, false},
		{Selector{Host: "a", PID: 43}, false},
		{Selector{Command: "redis-server"}, true},
		{Selector{Command: "redis-*"}, true},
		{Selector{Command: "redis-serve?"}, true},
		{Selector{Command: "/usr/bin/redis-server"}, true},
		{Selector{Command: "/usr/*/redis-server"}, true},
		{Selector{Command: "/usr/bin/redis-server /etc/redis.conf"}, true},
		{Selector{Command: "redis.conf"}, false},
		{Selector{Command: "redis"}, false},
		{Selector{Command: "*"}, true},
		{Selector{User: "redis"}, true},
		{Selector{User: "105"}, true},
		{Selector{User: "10"}, false},
		{Selector{User: "red*"}, false},
		{Selector{Cgroup: "/system.slice"}, true},
		{Selector{Cgroup: "/system.slice/"}, true},
		{Selector{Cgroup: "/system.slice/redis*"}, true},
		{Selector{Cgroup: "/*/*/shard-?"}, true},
		{Selector{Cgroup: "/system.slice/redis"}, false},
		{Selector{Cgroup: "/system.slice/redis.service/shard-1/x"}, false},
		{Selector{Cgroup: "/"}, true},
		{Selector{Unit: "redis"}, true},
		{Selector{Unit: "redis.service"}, true},
		{Selector{Unit: "r*"}, true},
		{Selector{Unit: "redi"}, false},
		{Selector{Unit: "redis.scope"}, false},
		{Selector{Label: "tier"}, true},
		{Selector{Label: "tier=cache"}, true},
		{Selector{Label: "tier="}, false},
		{Selector{Label: "empty="}, true},
		{Selector{Label: "zone"}, false},
		{Selector{User: "redis", Label: "tier=cache", Unit: "redis", Host: "a"}, true},
		{Selector{User: "redis", Label: "tier=web", Unit: "redis", Host: "a"}, false},
	} {
		if got := c.s.Fits("a", redis); got != c.want {
			t.Errorf("%+v fits: %v", c.s, got)
		}
	}
	// What a daemon could not tell fits no pattern.
	for _, s := range []Selector{{Command: "*"}, {Unit: "*"}, {Cgroup: "/"}, {User: "redis"}, {Label: "tier"}} {
		if s.Fits("a", appliance.ProcessInfo{PID: 1, UID: 0}) {
			t.Errorf("%+v fits a process of which nothing is known", s)
		}
	}
	if s := (Selector{Host: "a", PIDFile: "/run/x.pid"}); !s.NeedsFile() || !s.Fits("a", redis) || s.Fits("b", redis) {
		t.Error("a pidfile is not left to the daemon of its host")
	}
	if s := (Selector{PID: 1}); s.NeedsFile() {
		t.Error("a selector without a pidfile needs one")
	}
}
