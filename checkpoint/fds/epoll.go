package fds

import (
	"errors"
	"fmt"

	"golang.org/x/sys/unix"

	"github.com/pageferry/pageferry/checkpoint/image"
	"github.com/pageferry/pageferry/internal/sys"
)

// finishEpolls resolves registrations to open files. A registration is of a
// number and an open file; the number may since name another file or none.
func (e *examiner) finishEpolls() error {
	at := make(map[int]int, len(e.table)) // number -> e.files
	for i := range e.table {
		at[e.table[i].num] = e.table[i].file
	}
	byInode := make(map[FileKey][]int)
	for i, f := range e.files {
		byInode[f.key()] = append(byInode[f.key()], i)
	}
	for _, f := range e.files {
		if f.open.Kind != image.FileEpoll {
			continue
		}
		seen := make(map[int]int) // number -> registrations with it so far
		for _, it := range f.info.Epoll {
			slot := sys.KcmpEpollSlot{EFD: uint32(f.nums[0]), TFD: uint32(it.FD), TOff: uint32(seen[it.FD])}
			seen[it.FD]++
			k := FileKey{it.Dev, it.Ino}
			cur, open := at[it.FD]
			target := -1
			if open && e.files[cur].st.Mode&unix.S_IFMT == unix.S_IFSOCK && e.files[cur].key() == k {
				target = cur // the inode of a socket is of one open file only
			} else {
				candidates := byInode[k]
				if open {
					candidates = append([]int{cur}, candidates...)
				}
				for _, c := range candidates {
					r, err := sys.KcmpEpoll(e.pid, e.files[c].nums[0], e.pid, slot)
					if err != nil {
						if !e.content && (errors.Is(err, unix.EBADF) || errors.Is(err, unix.ENOENT)) {
							continue
						}
						return fmt.Errorf("process %d, %s: compare registration of %d: %w", e.pid, f.name(), it.FD, err)
					}
					if r == 0 {
						target = c
						break
					}
				}
			}
			if target < 0 {
				f.refuse("watches a file that was descriptor %d and is now held outside of the process", it.FD)
				continue
			}
			f.open.Epoll = append(f.open.Epoll, image.EpollItem{
				FD: it.FD, File: e.fileBase + target, Events: it.Events, Data: it.Data,
			})
		}
	}
	return nil
}
