package appliance

import (
	"io"
	"net"
	"os"
	"time"
)

// EnvKillPoints names, for tests, a unix stream socket. With it in its
// environment a daemon connects there at every kill point of migrate and
// checkpoint, writes the point's name and a newline, and goes on when the
// connection is closed: whoever listens can end the daemon, or cut its links, at
// just that moment. Without it, nothing of this is done.
const EnvKillPoints = "PAGEFERRY_KILL_POINTS"

// killPointLimit is how long a listener may keep a daemon at a point.
const killPointLimit = time.Minute

// killPoint is called with the name of every kill point; nil without
// EnvKillPoints. The function may be called by any goroutine. A listener that is
// not there, or gone, holds up nobody.
func killPoint() func(point string) {
	path := os.Getenv(EnvKillPoints)
	if path == "" {
		return nil
	}
	return func(point string) {
		c, err := net.DialUnix("unix", nil, &net.UnixAddr{Name: path, Net: "unix"})
		if err != nil {
			return
		}
		defer c.Close()
		_ = c.SetDeadline(time.Now().Add(killPointLimit))
		if _, err := io.WriteString(c, point+"\n"); err == nil {
			_, _ = c.Read(make([]byte, 1))
		}
	}
}
