package pager

import (
	"context"
	"fmt"

	"github.com/pageferry/pageferry/page"
)

// Show makes the pager show its process as files in ShowDir. Once.
func (c *Client) Show(ctx context.Context, m Show) error {
	_, err := c.call(ctx, opShow, m)
	return err
}

// Veiled says which pages of the source in r are still missing, and which of veiled
// memory the program has given up; own are those of the addresses at, where process
// pid sees r, at which it has copies of its own of all that is not zero: there the file
// does not count.
func (c *Client) Veiled(ctx context.Context, r page.Range, pid int, at page.Range) (missing, givenUp, own page.Set, err error) {
	p, err := c.call(ctx, opVeiled, rangesMsg{[]page.Range{r}, pid, at})
	if err != nil {
		return missing, givenUp, own, err
	}
	m, err := decode[veilReply](p)
	return m.Missing, m.GivenUp, m.Own, err
}

// Unveiling is a part of veiled memory that is about to be replaced, while the process
// stands still.
type Unveiling struct {
	At     page.Range // where the process sees it
	Src    page.Range // pages of the source; none is missing
	Shadow page.Addr  // what takes its place; 0 for new memory
}

// Unveil says that process pid, which stands still, gets other memory in the place of
// parts: they are not trapped any more. It returns which pages of the source the
// program has given up. Reveil takes that back for parts that were not replaced.
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

func (c *Client) unveil(ctx context.Context, m unveilMsg, parts []Unveiling) (givenUp page.Set, err error) {
	for _, u := range parts {
		m.At, m.Ranges, m.Shadows = append(m.At, u.At), append(m.Ranges, u.Src), append(m.Shadows, u.Shadow)
	}
	p, err := c.call(ctx, opUnveil, m)
	if err != nil {
		return givenUp, err
	}
	r, err := decode[veilReply](p)
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
