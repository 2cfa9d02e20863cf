package appliance

import "github.com/pageferry/pageferry/internal/yamlfile"

// FieldError is a value of the configuration that cannot be used.
type FieldError = yamlfile.FieldError

// LoadConfig reads the file at path. Its error begins with file:line:column
// where the file is at fault, and says what was meant where that can be told.
func LoadConfig(path string) (Config, error) {
	return yamlfile.Load[Config](path)
}

// ParseConfig is LoadConfig for bytes at hand; name stands in errors.
func ParseConfig(name string, data []byte) (Config, error) {
	return yamlfile.Decode[Config](name, data)
}
