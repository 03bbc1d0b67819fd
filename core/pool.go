package core

import (
	"context"
	"os"
	"runtime"
	"runtime/debug"
	"strconv"
	"sync"
	"sync/atomic"

	"bigsmall.dev/bigsmall/codecs"
)

// Job is how a long call runs. The zero value means all defaults. Cancel is polled, Done and Total are written,
// atomically; they may lie in a caller's memory.
type Job struct {
	Workers int    // threads, 0 for Workers()
	Cancel  *int32 // ends the call where not 0
	Done    *int64 // uncompressed bytes finished
	Total   *int64 // uncompressed bytes to do
}

var workers atomic.Int32

// Workers is the number of threads a call uses where its Job does not say.
func Workers() int {
	if n := workers.Load(); n > 0 {
		return int(n)
	}
	return runtime.GOMAXPROCS(0)
}

// SetWorkers sets that number; 0 returns to the default, the CPUs this process may run on.
func SetWorkers(n int) { workers.Store(int32(n)) }

// pool is the one place that knows how many threads a call has. Runs nest: whoever calls run works itself and takes
// helpers only while there are fewer than that. Nobody ever waits to be one of them: who waited for others simply goes
// on, and for a moment there may be one too many.
type pool struct {
	job     Job
	threads int
	free    atomic.Int32 // threads that could still be started
	mu      sync.Mutex
	scratch []*codecs.Scratch
}

// maxWidth bounds the threads of a call, and with them its memory: a few MiB each.
const maxWidth = 64

func newPool(job *Job) *pool {
	p := &pool{}
	if job != nil {
		p.job = *job
	}
	n := p.job.Workers
	if n <= 0 {
		n = Workers()
	}
	p.threads = min(n, maxWidth)
	p.free.Store(int32(p.threads - 1))
	return p
}

// width is the number of threads.
func (p *pool) width() int { return p.threads }

// wait waits for c, whose lock is held, and lets another thread run meanwhile.
func (p *pool) wait(c *sync.Cond) {
	p.idle(func() {
		c.Wait()
		c.L.Unlock()
	})
	c.L.Lock()
}

// idle runs f, which waits for other threads.
func (p *pool) idle(f func()) {
	p.free.Add(1)
	f()
	p.free.Add(-1)
}

// start reports whether one more thread may be started, and counts it.
func (p *pool) start() bool {
	for {
		n := p.free.Load()
		if n <= 0 {
			return false
		}
		if p.free.CompareAndSwap(n, n-1) {
			return true
		}
	}
}

func (p *pool) cancelled() bool { return p.job.Cancel != nil && atomic.LoadInt32(p.job.Cancel) != 0 }

func (p *pool) total(n int64) {
	if p.job.Total != nil {
		atomic.StoreInt64(p.job.Total, n)
	}
}

func (p *pool) done(n int64) {
	if p.job.Done != nil {
		atomic.AddInt64(p.job.Done, n)
	}
}

func (p *pool) take() *codecs.Scratch {
	p.mu.Lock()
	defer p.mu.Unlock()
	if n := len(p.scratch); n > 0 {
		s := p.scratch[n-1]
		p.scratch = p.scratch[:n-1]
		return s
	}
	return codecs.NewScratch()
}

func (p *pool) give(s *codecs.Scratch) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.scratch = append(p.scratch, s)
}

// run calls f for 0 to n-1 on up to width goroutines and returns the error of the lowest index that failed; after an
// error or a cancellation no further index is begun. A panic in f becomes a PanicError: left alone it would end the
// process that loaded this library.
func (p *pool) run(n int, f func(i int, s *codecs.Scratch) error) error {
	r := &runState{n: n, f: f, failed: n}
	if n > 0 {
		r.work(p)
		if r.helped.Load() {
			p.idle(r.helpers.Wait)
		}
	}
	return r.err
}

type runState struct {
	n       int
	f       func(int, *codecs.Scratch) error
	next    atomic.Int64
	helpers sync.WaitGroup
	helped  atomic.Bool
	mu      sync.Mutex
	failed  int
	err     error
	stop    atomic.Bool
}

func (r *runState) fail(i int, err error) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.stop.Store(true)
	if i < r.failed {
		r.failed, r.err = i, err
	}
}

func (r *runState) work(p *pool) {
	s := p.take()
	defer p.give(s)
	for !r.stop.Load() {
		i := int(r.next.Add(1)) - 1
		if i >= r.n {
			return
		}
		if i+1 < r.n && p.start() { // one more helper
			r.helpers.Add(1)
			r.helped.Store(true)
			go func() {
				defer func() { p.free.Add(1); r.helpers.Done() }()
				r.work(p)
			}()
		}
		r.call(p, i, s)
	}
}

func (r *runState) call(p *pool, i int, s *codecs.Scratch) {
	defer func() {
		if v := recover(); v != nil {
			r.fail(i, &PanicError{v, debug.Stack()})
		}
	}()
	// Destinations and sources may be memory a caller mapped: a page that is not there is his fault, and an error.
	defer debug.SetPanicOnFault(debug.SetPanicOnFault(true))
	err := context.Canceled
	if !p.cancelled() {
		err = r.f(i, s)
	}
	if err != nil {
		r.fail(i, err)
	}
}

// pid is part of the names of temporary files.
var pid = strconv.Itoa(os.Getpid())
