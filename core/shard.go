package core

import (
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"

	"github.com/go-json-experiment/json"
	"github.com/go-json-experiment/json/jsontext"
)

// indexName matches the names of indexes, that of a variant included: model.safetensors.index.fp16.json.
var indexName = regexp.MustCompile(`\.safetensors\.index(\.[^./]+)?\.json$`)

// sourceIndex is an index of the source, such as model.safetensors.index.json, with its exact text.
type sourceIndex struct {
	Name string `json:"name"`
	Text string `json:"text"`
}

// shards are the files that the index lists, sorted.
func (x sourceIndex) shards() ([]string, error) {
	var index struct {
		WeightMap map[string]string `json:"weight_map"`
	}
	if err := unmarshal([]byte(x.Text), &index); err != nil {
		return nil, failf(InvalidArgument, "is no index: %s", err)
	}
	return values(index.WeightMap), nil
}

func values(m map[string]string) []string {
	var out []string
	for _, v := range m {
		out = append(out, v)
	}
	slices.Sort(out)
	return slices.Compact(out)
}

// shardIndex is bigsmall.index.json. Its keys are those of the original package and of transformers; source_indexes is
// ours.
type shardIndex struct {
	Metadata struct {
		Version      string        `json:"bigsmall_version"`
		Container    int           `json:"container_version"`
		Format       string        `json:"format"`
		Mode         string        `json:"mode"`
		ModelType    string        `json:"model_type"`
		TotalSize    int64         `json:"total_size"`
		TotalRawSize int64         `json:"total_raw_size"`
		RatioPct     float64       `json:"ratio_pct"`
		ShardCount   int           `json:"shard_count"`
		TensorCount  int           `json:"tensor_count"`
		Shards       []string      `json:"shards"`
		Sources      []sourceIndex `json:"source_indexes"`
		// Of the original package from 3 on: tensors that are in no shard, being the same as others.
		Duplicates map[string]struct {
			Master string `json:"master"`
		} `json:"duplicate_map,omitempty"`
	} `json:"metadata"`
	WeightMap map[string]string `json:"weight_map"`
}

func (x *shardIndex) shards() []string {
	if len(x.Metadata.Shards) > 0 {
		return x.Metadata.Shards
	}
	return values(x.WeightMap)
}

// unlisted are the plain weights of a folder, where the index is one of variants only: the `.bs` files that no index lists.
func (x *shardIndex) unlisted(dir string) []string {
	listed := map[string]bool{}
	for _, s := range x.Metadata.Sources {
		if strings.HasSuffix(s.Name, sourceExt+".index.json") {
			return nil
		}
		shards, err := s.shards()
		if err != nil {
			return nil
		}
		for _, shard := range shards {
			listed[strings.TrimSuffix(shard, sourceExt)+ourExt] = true
		}
	}
	all, err := ourFiles(dir)
	if err != nil || len(listed) == 0 {
		return nil
	}
	return slices.DeleteFunc(all, func(path string) bool { return listed[filepath.Base(path)] })
}

// parseIndex reads an index that may have come from anywhere: every file it names is in its own folder.
func parseIndex(text []byte) (*shardIndex, error) {
	x := &shardIndex{}
	if err := unmarshal(text, x); err != nil {
		return nil, failf(Corrupt, "is no index: %s", err)
	}
	for _, s := range append(values(x.WeightMap), x.Metadata.Shards...) {
		if !plainName(s) {
			return nil, failf(Corrupt, "shard %q is no plain file name", s)
		}
	}
	for _, s := range x.Metadata.Sources {
		if !plainName(s.Name) || !indexName.MatchString(s.Name) {
			return nil, failf(Corrupt, "index %q is no plain file name of one", s.Name)
		}
	}
	return x, nil
}

// aliases are, by shard, the tensors that are in none, and the name of what they are the same as.
func (x *shardIndex) aliases() map[string]map[string]string {
	all := map[string]map[string]string{}
	for alias, same := range x.Metadata.Duplicates {
		shard := x.WeightMap[alias]
		if all[shard] == nil {
			all[shard] = map[string]string{}
		}
		all[shard][alias] = same.Master
	}
	return all
}

// madeSource is a model.safetensors.index.json that says of the restored shards what x says of its own.
func (x *shardIndex) madeSource() (sourceIndex, error) {
	var index struct {
		Metadata  struct{}          `json:"metadata"`
		WeightMap map[string]string `json:"weight_map"`
	}
	index.WeightMap = map[string]string{}
	for tensor, shard := range x.WeightMap {
		index.WeightMap[tensor] = strings.TrimSuffix(shard, ourExt) + sourceExt
	}
	text, err := json.Marshal(index, json.Deterministic(true), jsontext.WithIndent("  "))
	return sourceIndex{"model" + sourceExt + ".index.json", string(text)}, err
}

// plainName reports whether a name that a file gives is one in its own folder, on every system.
func plainName(s string) bool {
	return s != "" && s != "." && s != ".." && !strings.ContainsAny(s, "/\\\x00")
}

// makeIndex is the text of bigsmall.index.json for the shards of a directory.
func makeIndex(dir string, shards []string, sources []sourceIndex, opts Options) ([]byte, error) {
	x := &shardIndex{WeightMap: map[string]string{}}
	m := &x.Metadata
	m.Version, m.Container, m.Mode, m.ModelType = Version, formatVersion, modeNames[opts.Mode], "llm"
	m.Shards, m.ShardCount, m.Sources = shards, len(shards), sources
	for _, s := range shards {
		f, err := os.Open(filepath.Join(dir, s))
		if err != nil {
			return nil, err
		}
		info, err := f.Stat()
		if err != nil {
			f.Close()
			return nil, err
		}
		c, err := openContainer(s, f, info.Size())
		f.Close()
		if err != nil {
			return nil, err
		}
		for i := range c.entries {
			x.WeightMap[c.entries[i].name] = s
		}
		if m.Format == "" {
			m.Format = c.header.Format
		} else if m.Format != c.header.Format {
			m.Format = "mixed"
		}
		m.ModelType = c.header.ModelType
		m.TensorCount += len(c.entries)
		m.TotalSize += info.Size()
		m.TotalRawSize += c.sourceBytes()
	}
	if m.TotalRawSize > 0 {
		m.RatioPct = float64(m.TotalSize*10000/m.TotalRawSize) / 100
	}
	return json.Marshal(x, json.Deterministic(true), jsontext.WithIndent("  "))
}

// sourceBytes is the size of the source file.
func (c *container) sourceBytes() int64 {
	n := int64(len(c.source))
	for i := range c.entries {
		n += c.entries[i].bytes
	}
	return n
}

// findAliases reads of every index what its shards hold by another name only.
func (t *tree) findAliases() error {
	t.aliases = map[string]map[string]string{}
	for _, f := range t.files {
		if filepath.Base(f) != IndexName {
			continue
		}
		text, err := os.ReadFile(filepath.Join(t.root, f))
		if err != nil {
			return err
		}
		x, err := parseIndex(text)
		if err != nil {
			return inFile(err, filepath.Join(t.root, f))
		}
		for shard, names := range x.aliases() {
			t.aliases[filepath.Join(filepath.Dir(f), shard)] = names
		}
	}
	return nil
}

// check opens every `.bs` file of a tree, makes sure that the shards of each folder hold what its index says, and tells
// the pool how much there is to decode.
func (t *tree) check(root string, p *pool) error {
	if err := t.findAliases(); err != nil {
		return err
	}
	total := int64(0)
	holds := map[string]map[string]int{} // file -> its tensors
	for _, f := range t.files {
		if !strings.HasSuffix(f, ourExt) {
			continue
		}
		file, info, err := openRegular(filepath.Join(root, f))
		if err != nil {
			return err
		}
		c, err := openContainer(file.Name(), file, info.Size())
		file.Close()
		if err != nil {
			return err
		}
		if err := c.addAliases(t.aliases[f]); err != nil {
			return err
		}
		total += c.sourceBytes()
		holds[f] = c.byName
	}
	p.total(total)
	for _, f := range t.files {
		if filepath.Base(f) != IndexName {
			continue
		}
		text, err := os.ReadFile(filepath.Join(root, f))
		if err != nil {
			return err
		}
		x, err := parseIndex(text)
		if err != nil {
			return inFile(err, filepath.Join(root, f))
		}
		err = x.check(filepath.Join(root, f), func(shard, tensor string) bool {
			_, ok := holds[filepath.Join(filepath.Dir(f), shard)][tensor]
			return ok
		})
		if err != nil {
			return err
		}
	}
	return nil
}

// check makes sure that every tensor of the index, which stands in file, is where it says.
func (x *shardIndex) check(file string, holds func(shard, tensor string) bool) error {
	for tensor, shard := range x.WeightMap {
		if !holds(shard, tensor) {
			return &Error{Status: Corrupt, File: file, Tensor: tensor,
				Msg: "should be in " + shard + " and is not: the shard is missing, or of another model or version"}
		}
	}
	return nil
}
