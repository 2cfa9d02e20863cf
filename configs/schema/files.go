package schema

import (
	"bytes"
	"encoding/json"
	"path/filepath"
	"reflect"

	"github.com/pageferry/pageferry/appliance"
	"github.com/pageferry/pageferry/appliance/bulk"
)

// Files returns the text of each schema by its file's name. root is the module's
// folder, where the comments are read.
func Files(root string) (map[string][]byte, error) {
	docs, err := comments(filepath.Join(root, "appliance"), filepath.Join(root, "appliance/bulk"))
	if err != nil {
		return nil, err
	}
	files := map[string][]byte{}
	for name, t := range map[string]reflect.Type{"daemon.json": reflect.TypeFor[appliance.Config](), "bulk.json": reflect.TypeFor[bulk.File]()} {
		n, err := docs.of(t)
		if err != nil {
			return nil, err
		}
		n.Dialect = "https://json-schema.org/draft/2020-12/schema"
		n.Title = map[string]string{"daemon.json": "pageferry daemon --config FILE", "bulk.json": "pageferry bulk plan|run|status FILE"}[name]
		var b bytes.Buffer
		enc := json.NewEncoder(&b)
		enc.SetEscapeHTML(false)
		enc.SetIndent("", "  ")
		if err := enc.Encode(n); err != nil {
			return nil, err
		}
		files[name] = b.Bytes()
	}
	return files, nil
}
