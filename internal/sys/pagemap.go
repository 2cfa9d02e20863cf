package sys

import "structs"

// From <linux/fs.h>, PAGEMAP_SCAN (6.7).
const (
	PageIsWPAllowed = 1 << 0
	PageIsWritten   = 1 << 1
	PageIsFile      = 1 << 2
	PageIsPresent   = 1 << 3
	PageIsSwapped   = 1 << 4
	PageIsPFNZero   = 1 << 5
	PageIsHuge      = 1 << 6
	PageIsSoftDirty = 1 << 7 // 6.8
	PageIsGuard     = 1 << 8 // 6.15

	PMScanWPMatching   = 1 << 0
	PMScanCheckWPAsync = 1 << 1
)

// PAGEMAP_SCAN is the request number, of a /proc/PID/pagemap descriptor.
var PAGEMAP_SCAN = IOWR('f', 16, 96)

// PMScanArg is struct pm_scan_arg.
type PMScanArg struct {
	_                structs.HostLayout
	Size             uint64
	Flags            uint64
	Start, End       uint64
	WalkEnd          uint64
	vec, vecLen      uint64
	MaxPages         uint64
	CategoryInverted uint64
	CategoryMask     uint64
	CategoryAnyof    uint64
	ReturnMask       uint64
}

// PageRegion is struct page_region: [Start, End) in bytes and the categories
// that its pages have in common.
type PageRegion struct {
	_                      structs.HostLayout
	Start, End, Categories uint64
}
