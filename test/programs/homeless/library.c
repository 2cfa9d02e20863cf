// What the program is linked to, and what it loads: -DNAME=... -DFILE_="..." say which.
#include "table.h"

EMBED(content, FILE_)

const uint32_t *NAME(void) { return content; }
