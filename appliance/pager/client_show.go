package pager

import (
	"context"
	"errors"
	"fmt"

	"github.com/pageferry/pageferry/page"
)

// Show makes the pager show its process as files in ShowDir. Once.
func (c *Client) Show(ctx context.Context, m Show) error {
	_, err := c.call(ctx, opShow, m)
	return err
}

// Veiled is what is known of veiled memory.
type Veiled struct {
	// Missing are pages of the source that are not here.
	Missing page.Set
	// Own are the addresses at which the process has copies of its own of all that is
	// not zero: there the image does not count.
	Own page.Set
	// Has are all pages that the source has; what else there is of the image is zero.
	Has page.Set
}

// Veiled tells of process pid. All of a block of grain bytes counts as missing where a
// page of it is; 0 is for pages. Has is told only if asked for: it does not change.
func (c *Client) Veiled(ctx context.Context, pid int, grain uint64, has bool) (Veiled, error) {
	p, err := c.call(ctx, opVeiled, veiledMsg{pid, grain, has})
	if err != nil {
		return Veiled{}, err
	}
	m, err := decode[veilReply](p)
	return Veiled{m.Missing, m.Own, m.Has}, err
}

// Replaced says that no process sees pages of the source by the image any more, where it
// has other memory now: they need not be in the page cache.
func (c *Client) Replaced(ctx context.Context, src []page.Range) error {
	_, err := c.call(ctx, opReplaced, replacedMsg{src})
	return err
}

// ErrBusy: try again in a moment.
var ErrBusy = errors.New("pager: the program gives up memory just now")

// Unveiling is a part of veiled memory that is about to be replaced, while the process
// stands still.
type Unveiling struct {
	At     page.Range // where the process sees it
	Src    page.Range // pages of the source; none is missing
	Shadow page.Addr  // what takes its place; 0 for new memory
}

// Unveil says that process pid, which stands still, is about to get its shadows in the place
// of parts: those are not trapped any more. It returns which of the pages that the
// source has the program has given up. With ErrBusy nothing was done: the program gives up memory just now. Reveil
// takes that back for parts that were not replaced.
func (c *Client) Unveil(ctx context.Context, pid int, parts []Unveiling) (givenUp page.Set, err error) {
	return c.unveil(ctx, unveilMsg{PID: pid}, parts)
}

// Overwrite says that what process pid has written of parts is copied over their shadows
// from now on, while it runs: a write there must not wait for anything. The process
// stands still.
func (c *Client) Overwrite(ctx context.Context, pid int, parts []Unveiling) error {
	_, err := c.unveil(ctx, unveilMsg{PID: pid, Early: true}, parts)
	return err
}

// Reveil: see Unveil.
func (c *Client) Reveil(ctx context.Context, pid int, parts []Unveiling) error {
	_, err := c.unveil(ctx, unveilMsg{PID: pid, Again: true}, parts)
	return err
}

// Certain is Unveil's second half: nothing keeps parts from being replaced any more, whatever
// becomes of the caller, and they are not trapped any more either.
func (c *Client) Certain(ctx context.Context, pid int, parts []Unveiling) error {
	_, err := c.unveil(ctx, unveilMsg{PID: pid, Certain: true}, parts)
	return err
}

func (c *Client) unveil(ctx context.Context, m unveilMsg, parts []Unveiling) (givenUp page.Set, err error) {
	for _, u := range parts {
		m.At, m.Ranges, m.Shadows = append(m.At, u.At), append(m.Ranges, u.Src), append(m.Shadows, u.Shadow)
	}
	p, err := c.call(ctx, opUnveil, m)
	if err != nil {
		return givenUp, err
	}
	r, err := decode[veilReply](p)
	if err == nil && r.Busy {
		err = ErrBusy
	}
	return r.GivenUp, err
}

// Shown says what the pager shows, and by which device it is known in
// /proc/PID/maps, and the image by which inode; dev is 0 where it shows nothing.
func (c *Client) Shown(ctx context.Context) (dev, image uint64, m Show, views []View, err error) {
	p, err := c.call(ctx, opShown, nil)
	if err != nil {
		return 0, 0, m, nil, err
	}
	r, err := decode[shownReply](p)
	return r.Dev, r.Image, r.Show, r.Views, err
}

// Read reads len(buf) bytes of file number i of the source from offset on, which is a
// whole number of pages. What lies behind its end is zero.
func (c *Client) Read(ctx context.Context, i int, offset int64, buf []byte) error {
	p, err := c.call(ctx, opRead, readMsg{i, offset, len(buf)})
	if err != nil {
		return err
	}
	b, err := decode[[]byte](p)
	if err == nil && len(b) != len(buf) {
		err = fmt.Errorf("pager: %d bytes of file %d, not %d", len(b), i, len(buf))
	}
	copy(buf, b)
	return err
}
