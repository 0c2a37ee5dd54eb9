/*
 * http.c
 *		HTTP requests in, results out; with http_outcome.c and http_peer.c the
 *		only file that knows libcurl.
 *
 * Called by the sync worker's event loop, outside any transaction and without
 * locks; no function here waits for a socket.  libcurl's sockets live in an
 * epoll set of our own, because a WaitEventSet of PostgreSQL 15 cannot forget
 * a socket; the set's descriptor is itself readable when one of them is ready,
 * so the worker waits for that one descriptor beside its latch.
 *
 * Callbacks only store what they see and return: an ERROR would jump through
 * libcurl's stack.  What they collect lies in malloc'd memory, since palloc
 * may throw.  A failed request is data, never an ERROR.
 *
 * libcurl looks names up in a thread.  Signals are blocked around every call
 * that may start one, so that the thread inherits the mask and PostgreSQL's
 * handlers run in the main thread only.  At process exit nothing of libcurl is
 * called: its clean-up functions may wait for such a thread.
 *
 * A request is on exactly one list: free, running (libcurl has it) or done
 * (its result waits to be taken).
 */
#include "postgres.h"

#include <curl/curl.h>
#include <math.h>
#include <signal.h>
#include <sys/epoll.h>
#include <unistd.h>

#include "compat.h"
#include "http.h"
#include "http_outcome.h"
#include "http_peer.h"
#include "lib/ilist.h"
#include "portability/instr_time.h"
#include "storage/fd.h"
#include "utils/memutils.h"

/* All header lines of one answer together. */
#define MAX_HEADER_BYTES (64 * 1024)

/* An answer's buffer that is larger is given back after the result is taken. */
#define KEEP_ANSWER_BYTES (64 * 1024)

/* A connection is not reused for longer (s), so that a changed DNS entry counts. */
#define MAX_CONNECTION_AGE 600

/* Nor after it was idle for longer (s): middleboxes forget idle connections silently. */
#define MAX_CONNECTION_IDLE 60

/* A single request makes no progress below this (bytes/s). */
#define LOW_SPEED 100L

/* Sent at once, as far as the socket takes it (bytes). */
#define UPLOAD_BUFFER (512 * 1024L)

/* TCP keepalive probes (s), for requests that wait long for their answer. */
#define KEEPALIVE_IDLE 30
#define KEEPALIVE_INTERVAL 10

/* Used when a request brings no timeout: without one it could hang for ever. */
#define DEFAULT_TIMEOUT_MS 30000

typedef struct Request
{
	dlist_node	node;
	CURL	   *easy;			/* made at first use, then kept */
	struct curl_slist *headers;
	char	   *answer;			/* malloc'd */
	size_t		answer_len;
	size_t		answer_size;
	size_t		max_response;
	SmHttpSeen	seen;
	char		curl_error[CURL_ERROR_SIZE];
	SmHttpResult result;		/* without the body */
} Request;

static SmHttpSettings http_settings;
static MemoryContext settings_context = NULL;	/* their strings */
static CURLM *multi = NULL;
static int	epoll_fd = -1;
static dlist_head free_requests;
static dlist_head running_requests;
static dlist_head done_requests;
static long timer_ms = -1;		/* libcurl wants to be called so long after ... */
static instr_time timer_start;	/* ... this time; -1: not at all */
static int	watch_errno = 0;	/* stored by watch_socket(), raised by sm_http_run() */

/* ---------------------------------------------------------------------------
 * libcurl's callbacks: no ERROR, no palloc
 * ------------------------------------------------------------------------ */

static size_t
write_answer(char *data, size_t size, size_t nmemb, void *arg)
{
	Request    *r = (Request *) arg;
	size_t		len = size * nmemb;

	if (len > r->max_response - r->answer_len)
	{
		r->seen.too_long = true;
		return CURL_WRITEFUNC_ERROR;
	}
	if (r->answer_len + len > r->answer_size)
	{
		size_t		newsize = Max(r->answer_size * 2, (size_t) 8192);
		char	   *newbuf;

		newsize = Max(newsize, r->answer_len + len);
		newbuf = realloc(r->answer, newsize);
		if (newbuf == NULL)
		{
			r->seen.no_memory = true;
			return CURL_WRITEFUNC_ERROR;
		}
		r->answer = newbuf;
		r->answer_size = newsize;
	}
	memcpy(r->answer + r->answer_len, data, len);
	r->answer_len += len;
	return len;
}

static size_t
note_header(char *line, size_t size, size_t nitems, void *arg)
{
	Request    *r = (Request *) arg;
	size_t		len = size * nitems;

	r->seen.header_bytes += len;
	if (r->seen.header_bytes > MAX_HEADER_BYTES)
	{
		r->seen.too_long = true;
		return CURL_WRITEFUNC_ERROR;
	}

	/* 1xx answers bring a status line and a blank line of their own */
	if (len >= 5 && memcmp(line, "HTTP/", 5) == 0)
		r->seen.headers_done = false;
	else if (line[0] == '\r' || line[0] == '\n')
		r->seen.headers_done = true;
	return len;
}

static int
watch_socket(CURL *easy, curl_socket_t fd, int what, void *arg, void *socket_arg)
{
	struct epoll_event event = {0};

	/* the kernel forgets closed sockets by itself, so this may find none */
	if (what == CURL_POLL_REMOVE)
	{
		(void) epoll_ctl(epoll_fd, EPOLL_CTL_DEL, fd, NULL);
		return 0;
	}

	event.data.fd = fd;
	if (what & CURL_POLL_IN)
		event.events |= EPOLLIN;
	if (what & CURL_POLL_OUT)
		event.events |= EPOLLOUT;
	if (epoll_ctl(epoll_fd, EPOLL_CTL_MOD, fd, &event) < 0 &&
		(errno != ENOENT || epoll_ctl(epoll_fd, EPOLL_CTL_ADD, fd, &event) < 0))
		watch_errno = errno;
	return 0;
}

static int
set_timer(CURLM *curlm, long timeout_ms, void *arg)
{
	timer_ms = timeout_ms;
	INSTR_TIME_SET_CURRENT(timer_start);
	return 0;
}

/* ---------------------------------------------------------------------------
 * Start and settings
 * ------------------------------------------------------------------------ */

/*
 * Block what can be blocked while libcurl may start a thread.  Faults stay
 * open: a blocked SIGSEGV would end the process without a trace.
 */
static void
block_signals(sigset_t *saved)
{
	sigset_t	all;

	sigfillset(&all);
	sigdelset(&all, SIGABRT);
	sigdelset(&all, SIGBUS);
	sigdelset(&all, SIGFPE);
	sigdelset(&all, SIGILL);
	sigdelset(&all, SIGSEGV);
	sigdelset(&all, SIGSYS);
	sigdelset(&all, SIGTRAP);
	pthread_sigmask(SIG_SETMASK, &all, saved);
}

static void
restore_signals(const sigset_t *saved)
{
	pthread_sigmask(SIG_SETMASK, saved, NULL);
}

void
sm_http_init(const SmHttpSettings *settings)
{
	const curl_version_info_data *version = curl_version_info(CURLVERSION_NOW);

	Assert(multi == NULL);

	/* built against a newer library than is installed here? */
	if (version->version_num < LIBCURL_VERSION_NUM >> 8 << 8)
		ereport(ERROR,
				(errcode(ERRCODE_FEATURE_NOT_SUPPORTED),
				 errmsg("libcurl %s is older than the one this server was built with, %s",
						version->version, LIBCURL_VERSION)));

	/* a look-up in the main thread would stop the worker for minutes */
	if ((version->features & CURL_VERSION_ASYNCHDNS) == 0)
		ereport(ERROR,
				(errcode(ERRCODE_FEATURE_NOT_SUPPORTED),
				 errmsg("libcurl was built without asynchronous name resolution")));

	if (curl_global_init(CURL_GLOBAL_DEFAULT) != CURLE_OK ||
		(multi = curl_multi_init()) == NULL)
		ereport(ERROR,
				(errcode(ERRCODE_EXTERNAL_ROUTINE_EXCEPTION),
				 errmsg("could not initialize libcurl")));

	if (!AcquireExternalFD() || (epoll_fd = epoll_create1(EPOLL_CLOEXEC)) < 0)
		ereport(ERROR,
				(errcode_for_socket_access(),
				 errmsg("could not create an epoll set: %m")));

	if (curl_multi_setopt(multi, CURLMOPT_SOCKETFUNCTION, watch_socket) != CURLM_OK ||
		curl_multi_setopt(multi, CURLMOPT_TIMERFUNCTION, set_timer) != CURLM_OK ||
		curl_multi_setopt(multi, CURLMOPT_MAXCONNECTS,
						  (long) SM_HTTP_MAX_REQUESTS) != CURLM_OK)
		elog(ERROR, "could not set up libcurl");

	dlist_init(&free_requests);
	dlist_init(&running_requests);
	dlist_init(&done_requests);
	for (int i = 0; i < SM_HTTP_MAX_REQUESTS; i++)
	{
		Request    *r = MemoryContextAllocZero(TopMemoryContext, sizeof(Request));

		dlist_push_tail(&free_requests, &r->node);
	}

	sm_http_configure(settings);
}

static const char *
copy_setting(MemoryContext context, const char *value)
{
	return (value == NULL || value[0] == '\0') ? NULL : MemoryContextStrdup(context, value);
}

/*
 * Replace the settings.  Connections made under others are not reused, since
 * libcurl compares; requests under way keep theirs.
 */
void
sm_http_configure(const SmHttpSettings *settings)
{
	MemoryContext fresh = AllocSetContextCreate(TopMemoryContext, "softmobile http",
												ALLOCSET_SMALL_SIZES);

	http_settings.ca_file = copy_setting(fresh, settings->ca_file);
	http_settings.client_cert_file = copy_setting(fresh, settings->client_cert_file);
	http_settings.client_key_file = copy_setting(fresh, settings->client_key_file);
	http_settings.user_agent = copy_setting(fresh, settings->user_agent);
	sm_http_peer_configure(settings->networks, fresh);

	if (settings_context != NULL)
		MemoryContextDelete(settings_context);
	settings_context = fresh;
}

/* ---------------------------------------------------------------------------
 * Submitting
 * ------------------------------------------------------------------------ */

/* Forget the last request, keep the easy handle. */
static void
clear_request(Request *r)
{
	curl_slist_free_all(r->headers);
	r->headers = NULL;
	if (r->answer_size > KEEP_ANSWER_BYTES)
	{
		free(r->answer);
		r->answer = NULL;
		r->answer_size = 0;
	}
	r->answer_len = 0;
	memset(&r->seen, 0, sizeof(r->seen));
	r->curl_error[0] = '\0';
	memset(&r->result, 0, sizeof(r->result));
	r->result.retry_after_ms = -1;
}

/* Is it a URL that libcurl can use, and http or https? */
static bool
url_is_usable(const char *url)
{
	CURLU	   *parsed = curl_url();
	char	   *scheme = NULL;
	bool		usable;

	usable = parsed != NULL && url != NULL &&
		curl_url_set(parsed, CURLUPART_URL, url, 0) == CURLUE_OK &&
		curl_url_get(parsed, CURLUPART_SCHEME, &scheme, 0) == CURLUE_OK &&
		(strcmp(scheme, "http") == 0 || strcmp(scheme, "https") == 0);
	curl_free(scheme);
	curl_url_cleanup(parsed);
	return usable;
}

/*
 * Append one header; a NULL value appends none.  A value with a control
 * character is refused, it could smuggle in a header of its own.
 */
static CURLcode
add_header(Request *r, const char *name, const char *before, const char *value,
		   const char *after)
{
	struct curl_slist *extended;
	char	   *line;

	if (value == NULL)
		return CURLE_OK;
	for (const char *p = value; *p != '\0'; p++)
	{
		if ((unsigned char) *p < 0x20 || *p == 0x7f)
			return CURLE_BAD_FUNCTION_ARGUMENT;
	}

	line = psprintf("%s: %s%s%s", name, before, value, after);
	extended = curl_slist_append(r->headers, line);
	pfree(line);
	if (extended == NULL)
		return CURLE_OUT_OF_MEMORY;
	r->headers = extended;
	return CURLE_OK;
}

static CURLcode
add_headers(Request *r, const SmHttpRequest *request)
{
	char	   *reason = NULL;
	CURLcode	rc = CURLE_OK;

	if (request->reason != NULL && request->reason[0] != '\0')
	{
		reason = curl_easy_escape(r->easy, request->reason, 0);
		if (reason == NULL)
			return CURLE_OUT_OF_MEMORY;
	}

#define ADD(name, before, value, after) \
	if (rc == CURLE_OK) \
		rc = add_header(r, name, before, value, after)

	ADD("X-Reason", "", reason, "");
	curl_free(reason);
	ADD("Content-Type", "", request->content_type, "");
	ADD("Content-Encoding", "", request->content_encoding, "");
	ADD("Authorization", "Bearer ", request->bearer, "");
	ADD("Idempotency-Key", "\"", request->idempotency_key, "\"");
	ADD("traceparent", "", request->traceparent, "");
	ADD("webhook-id", "", request->webhook_id, "");
	ADD("webhook-timestamp", "", request->webhook_timestamp, "");
	ADD("webhook-signature", "", request->webhook_signature, "");
	ADD("Accept", "", "application/json, application/problem+json, */*;q=0.1", "");
	/* a compressed answer could unfold to any size */
	ADD("Accept-Encoding", "", "identity", "");
	/* no "Expect: 100-continue": it costs a round trip, or a second where it is ignored */
	ADD("Expect", "", "", "");

#undef ADD
	return rc;
}

/* All options of a handle; what is not set here has libcurl's default. */
static CURLcode
set_options(Request *r, const SmHttpRequest *request)
{
	CURL	   *easy = r->easy;
	CURLcode	rc = CURLE_OK;
	long		connect_ms = request->connect_timeout_ms;
	long		request_ms = request->request_timeout_ms;
	long		http_version = CURL_HTTP_VERSION_1_1;

	if (request_ms <= 0)
		request_ms = DEFAULT_TIMEOUT_MS;
	if (connect_ms <= 0)
		connect_ms = request_ms;
	if (curl_version_info(CURLVERSION_NOW)->features & CURL_VERSION_HTTP2)
		http_version = CURL_HTTP_VERSION_2TLS;

#define SET(option, value) \
	if (rc == CURLE_OK) \
		rc = curl_easy_setopt(easy, option, value)

	/* how libcurl behaves inside this process */
	SET(CURLOPT_PRIVATE, r);
	SET(CURLOPT_NOSIGNAL, 1L);
	if (rc == CURLE_OK)
		rc = sm_curl_quick_exit(easy);
	SET(CURLOPT_ERRORBUFFER, r->curl_error);
	SET(CURLOPT_WRITEFUNCTION, write_answer);
	SET(CURLOPT_WRITEDATA, r);
	SET(CURLOPT_HEADERFUNCTION, note_header);
	SET(CURLOPT_HEADERDATA, r);

	/* nothing from the environment, nowhere but the URL */
	SET(CURLOPT_PROTOCOLS_STR, "http,https");
	SET(CURLOPT_PROXY, "");
	SET(CURLOPT_NETRC, (long) CURL_NETRC_IGNORED);
	SET(CURLOPT_FOLLOWLOCATION, 0L);
	SET(CURLOPT_HTTP09_ALLOWED, 0L);
	SET(CURLOPT_HTTP_VERSION, http_version);
	if (rc == CURLE_OK)
		rc = sm_http_peer_set_options(easy, &r->seen);

	/*
	 * A request of the worker ends after its time, whatever happens: no abort at
	 * low speed, which a server that thinks for long would look like too.  The
	 * answer to a single request may be long and the line thin, and somebody
	 * waits who can cancel: it ends when nothing arrives for that time.
	 */
	SET(CURLOPT_CONNECTTIMEOUT_MS, connect_ms);
	SET(CURLOPT_TIMEOUT_MS, request->single ? 0L : request_ms);
	SET(CURLOPT_LOW_SPEED_LIMIT, request->single ? LOW_SPEED : 0L);
	SET(CURLOPT_LOW_SPEED_TIME, request->single ? Max(request_ms / 1000, 1L) : 0L);
	SET(CURLOPT_TCP_NODELAY, 1L);
	SET(CURLOPT_TCP_KEEPALIVE, 1L);
	SET(CURLOPT_TCP_KEEPIDLE, (long) KEEPALIVE_IDLE);
	SET(CURLOPT_TCP_KEEPINTVL, (long) KEEPALIVE_INTERVAL);
	SET(CURLOPT_MAXAGE_CONN, (long) MAX_CONNECTION_IDLE);
	SET(CURLOPT_MAXLIFETIME_CONN, (long) MAX_CONNECTION_AGE);

	/* a CA file replaces the system's directory of authorities, not only its bundle */
	SET(CURLOPT_SSLVERSION, (long) CURL_SSLVERSION_TLSv1_2);
	SET(CURLOPT_SSL_VERIFYPEER, 1L);
	SET(CURLOPT_SSL_VERIFYHOST, 2L);
	if (rc == CURLE_OK)
		rc = sm_curl_no_ca_cache(easy);
	if (http_settings.ca_file != NULL)
	{
		SET(CURLOPT_CAINFO, http_settings.ca_file);
		SET(CURLOPT_CAPATH, NULL);
	}
	/* what is known of a certificate is known of a new connection only */
	SET(CURLOPT_FRESH_CONNECT, request->single ? 1L : 0L);
	SET(CURLOPT_FORBID_REUSE, request->single ? 1L : 0L);
	SET(CURLOPT_CERTINFO, request->single ? 1L : 0L);
	SET(CURLOPT_SSLCERT, http_settings.client_cert_file);
	SET(CURLOPT_SSLKEY, http_settings.client_key_file);

	SET(CURLOPT_USERAGENT, http_settings.user_agent);
	SET(CURLOPT_URL, request->url);
	SET(CURLOPT_HTTPHEADER, r->headers);
	if (strcmp(request->method, "POST") == 0)
	{
		/* without a body libcurl would read standard input */
		SET(CURLOPT_POST, 1L);
		/* A usual body leaves in one piece: what follows the first would wait until the worker has built the next. */
		SET(CURLOPT_UPLOAD_BUFFERSIZE, UPLOAD_BUFFER);
		SET(CURLOPT_POSTFIELDSIZE_LARGE, (curl_off_t) request->body_len);
		SET(CURLOPT_POSTFIELDS, request->body_len > 0 ? request->body : "");
	}
	else
		SET(CURLOPT_HTTPGET, 1L);

#undef SET
	return rc;
}

bool
sm_http_submit(const SmHttpRequest *request)
{
	Request    *r;
	sigset_t	saved;
	CURLcode	rc;

	if (strcmp(request->method, "POST") != 0 && strcmp(request->method, "GET") != 0)
		elog(ERROR, "unexpected HTTP method \"%s\"", request->method);

	if (dlist_is_empty(&free_requests))
		return false;

	/* it stays on the list of free ones until nothing can throw any more */
	r = dlist_head_element(Request, node, &free_requests);
	clear_request(r);
	r->result.tag = request->tag;
	r->max_response = request->max_response;

	if (r->easy == NULL && (r->easy = curl_easy_init()) == NULL)
		rc = CURLE_OUT_OF_MEMORY;
	else
	{
		curl_easy_reset(r->easy);	/* the options, not the connections */
		if (!url_is_usable(request->url))
			rc = CURLE_URL_MALFORMAT;
		else if ((rc = add_headers(r, request)) == CURLE_OK)
			rc = set_options(r, request);
	}

	dlist_delete(&r->node);
	if (rc == CURLE_OK)
	{
		block_signals(&saved);
		if (curl_multi_add_handle(multi, r->easy) != CURLM_OK)
			rc = CURLE_FAILED_INIT;
		restore_signals(&saved);
	}
	if (rc == CURLE_OK)
		dlist_push_tail(&running_requests, &r->node);
	else
	{
		const char *why = curl_easy_strerror(rc);

		if (rc == CURLE_URL_MALFORMAT)
			why = "not a valid http or https URL";
		else if (rc == CURLE_BAD_FUNCTION_ARGUMENT)
			why = "control character in a header";
		sm_http_outcome_fail(&r->result, SM_HTTP_UNUSABLE, why);
		dlist_push_tail(&done_requests, &r->node);
	}
	return true;
}

/* ---------------------------------------------------------------------------
 * The event loop's side
 * ------------------------------------------------------------------------ */

int
sm_http_fd(void)
{
	return epoll_fd;
}

/* Milliseconds until libcurl wants to be called, -1: it does not. */
static long
timer_left_ms(void)
{
	instr_time	elapsed;

	if (timer_ms < 0)
		return -1;
	INSTR_TIME_SET_CURRENT(elapsed);
	INSTR_TIME_SUBTRACT(elapsed, timer_start);
	return (long) Max(ceil((double) timer_ms - INSTR_TIME_GET_MILLISEC(elapsed)), 0.0);
}

/* How long may the caller sleep?  -1: until sm_http_fd() is readable. */
long
sm_http_timeout_ms(void)
{
	return dlist_is_empty(&done_requests) ? timer_left_ms() : 0;
}

/* libcurl has finished with a request: make its result. */
static void
finish_request(Request *r, CURLcode code)
{
	if (!sm_http_outcome_judge(r->easy, code, &r->seen, r->curl_error, &r->result))
		r->answer_len = 0;

	dlist_delete(&r->node);
	dlist_push_tail(&done_requests, &r->node);
}

/* Do all that can be done now. */
void
sm_http_run(void)
{
	struct epoll_event events[2 * SM_HTTP_MAX_REQUESTS];
	sigset_t	saved;
	CURLMsg    *message;
	int			nevents;
	int			nrunning;
	int			nqueued;

	nevents = epoll_wait(epoll_fd, events, lengthof(events), 0);

	block_signals(&saved);

	for (int i = 0; i < nevents; i++)
	{
		int			mask = 0;

		/*
		 * Faults are reported as readable: an answer may lie before them, and
		 * reading brings both to light.
		 */
		if (events[i].events & (EPOLLIN | EPOLLERR | EPOLLHUP))
			mask |= CURL_CSELECT_IN;
		if (events[i].events & EPOLLOUT)
			mask |= CURL_CSELECT_OUT;
		curl_multi_socket_action(multi, events[i].data.fd, mask, &nrunning);
	}

	if (timer_left_ms() == 0)
	{
		timer_ms = -1;			/* libcurl sets it anew if it wants to */
		curl_multi_socket_action(multi, CURL_SOCKET_TIMEOUT, 0, &nrunning);
	}

	while ((message = curl_multi_info_read(multi, &nqueued)) != NULL)
	{
		CURL	   *easy = message->easy_handle;
		CURLcode	code = message->data.result;
		char	   *private = NULL;

		if (message->msg != CURLMSG_DONE)
			continue;
		curl_easy_getinfo(easy, CURLINFO_PRIVATE, &private);
		finish_request((Request *) private, code);
		curl_multi_remove_handle(multi, easy);
	}

	restore_signals(&saved);

	if (watch_errno != 0)
	{
		errno = watch_errno;
		watch_errno = 0;
		ereport(ERROR,
				(errcode_for_socket_access(),
				 errmsg("could not watch a socket: %m")));
	}
}

bool
sm_http_has_result(void)
{
	return !dlist_is_empty(&done_requests);
}

/* Take the oldest result.  Its body goes to CurrentMemoryContext. */
bool
sm_http_next_result(SmHttpResult *result)
{
	Request    *r;

	if (dlist_is_empty(&done_requests))
		return false;

	r = dlist_head_element(Request, node, &done_requests);
	*result = r->result;
	result->body = palloc(r->answer_len + 1);
	if (r->answer_len > 0)
		memcpy(result->body, r->answer, r->answer_len);
	result->body[r->answer_len] = '\0';
	result->body_len = r->answer_len;

	dlist_delete(&r->node);
	clear_request(r);
	dlist_push_head(&free_requests, &r->node);
	return true;
}

/* Drop a request, or its result if nobody has taken it.  True if there was one. */
bool
sm_http_cancel(void *tag)
{
	dlist_head *lists[] = {&running_requests, &done_requests};
	dlist_mutable_iter iter;
	sigset_t	saved;

	for (int i = 0; i < lengthof(lists); i++)
	{
		dlist_foreach_modify(iter, lists[i])
		{
			Request    *r = dlist_container(Request, node, iter.cur);

			if (r->result.tag != tag)
				continue;
			if (lists[i] == &running_requests)
			{
				block_signals(&saved);
				curl_multi_remove_handle(multi, r->easy);
				restore_signals(&saved);
			}
			dlist_delete(&r->node);
			clear_request(r);
			dlist_push_head(&free_requests, &r->node);
			return true;
		}
	}
	return false;
}
