package appliance

import (
	"context"
	"errors"
	"fmt"

	"github.com/pageferry/pageferry/migrate"
	"github.com/pageferry/pageferry/migrate/stream"
	"github.com/pageferry/pageferry/page"
)

// goneProcess is what is found of a process that does not exist any more.
type goneProcess struct{}

func (goneProcess) Isolate(context.Context) error         { return migrate.ErrGone }
func (goneProcess) Track(context.Context) (string, error) { return "", migrate.ErrGone }
func (goneProcess) Look(context.Context) (migrate.Look, error) {
	return migrate.Look{}, migrate.ErrGone
}
func (goneProcess) Throttle(float64) error           { return migrate.ErrGone }
func (goneProcess) Peek(*page.Set) (page.Set, error) { return page.Set{}, migrate.ErrGone }
func (goneProcess) SwitchNears()                     {}
func (goneProcess) Freeze(context.Context) (migrate.State, error) {
	return migrate.State{}, migrate.ErrGone
}
func (goneProcess) Hold(context.Context) error         { return migrate.ErrGone }
func (goneProcess) Held(context.Context) (bool, error) { return false, migrate.ErrGone }
func (goneProcess) Thaw(context.Context) error         { return migrate.ErrGone }
func (goneProcess) Kill(context.Context) error         { return migrate.ErrGone }
func (goneProcess) Close() error                       { return nil }
func (goneProcess) ReadPages(page.Space, []page.Range, []byte) error {
	return fmt.Errorf("%w: %w", stream.ErrGone, migrate.ErrGone)
}

// othersProcess is one that a newer migration has: for an older one it runs.
type othersProcess struct{ goneProcess }

var errOthers = errors.New("the process belongs to a newer migration")

func (othersProcess) Thaw(context.Context) error                       { return nil }
func (othersProcess) Held(context.Context) (bool, error)               { return false, errOthers }
func (othersProcess) ReadPages(page.Space, []page.Range, []byte) error { return errOthers }
