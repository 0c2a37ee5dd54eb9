/*
 * http.h
 *		HTTP requests in, results out, without ever blocking: see http.c.
 */
#ifndef SM_HTTP_H
#define SM_HTTP_H

/* Requests in flight at once, and results that wait to be taken. */
#define SM_HTTP_MAX_REQUESTS 64

/*
 * What every request shares.  Strings are copied by sm_http_configure(), NULL
 * and '' both mean none.  Changed settings hold for requests submitted later.
 */
typedef struct SmHttpSettings
{
	const char *ca_file;		/* PEM; given, nothing else is trusted */
	const char *client_cert_file;
	const char *client_key_file;
	const char *networks;		/* as sm_networks_parse() takes them; none: any address */
	const char *user_agent;
} SmHttpSettings;

/*
 * One request.  The struct and its strings may be forgotten after
 * sm_http_submit(); only the body must stay until the result is taken or the
 * request is cancelled, because it is sent from where it lies.
 */
typedef struct SmHttpRequest
{
	const char *method;			/* "POST" or "GET" */
	const char *url;
	const char *body;
	size_t		body_len;
	const char *content_type;	/* NULL: none, as for all below */
	const char *content_encoding;
	const char *bearer;			/* token, never logged */
	const char *idempotency_key;	/* bare; sent as a quoted string */
	const char *reason;			/* UTF-8; sent percent-encoded as X-Reason */
	const char *traceparent;
	const char *webhook_id;		/* these three as sign.c makes them */
	const char *webhook_timestamp;
	const char *webhook_signature;
	int			connect_timeout_ms;
	int			request_timeout_ms; /* whole request, name look-up included; single: without progress */
	size_t		max_response;	/* a longer answer is SM_HTTP_PROTOCOL */
	bool		single;			/* a connection for this request only; tells certificate_until */
	void	   *tag;			/* the caller's, returned in the result */
} SmHttpRequest;

typedef enum SmHttpOutcome
{
	SM_HTTP_ANSWERED,			/* a whole answer; status says which, 3xx too */
	SM_HTTP_OFFLINE,			/* no name, no route, refused, reset, timed out */
	SM_HTTP_TLS,				/* verification, handshake */
	SM_HTTP_PROTOCOL,			/* no HTTP, too long, cut off */
	SM_HTTP_UNUSABLE			/* our own fault: bad URL, unreadable file, no memory */
} SmHttpOutcome;

typedef struct SmHttpResult
{
	void	   *tag;
	SmHttpOutcome outcome;
	long		status;			/* HTTP status, 0 unless SM_HTTP_ANSWERED */
	char	   *body;			/* zero-terminated, never NULL; '' unless answered */
	size_t		body_len;
	char		content_type[128];
	int64		retry_after_ms; /* -1: none; else 0 to one day */
	int64		date;			/* Date header in Unix seconds; 0: none */
	char		certificate_until[64];	/* as libcurl writes it; '' when unknown */
	long		total_ms;
	char		error[256];		/* '' if answered, else why; without any secret */
} SmHttpResult;

/* once per process; ERROR when libcurl or the kernel refuses */
extern void sm_http_init(const SmHttpSettings *settings);
extern void sm_http_configure(const SmHttpSettings *settings);

/*
 * Every request that was accepted brings exactly one result, unless it is
 * cancelled.  False: SM_HTTP_MAX_REQUESTS are under way or not yet taken.
 */
pg_nodiscard extern bool sm_http_submit(const SmHttpRequest *request);

/* drop the request with this tag, or its result; true if there was one */
extern bool sm_http_cancel(void *tag);

/*
 * The event loop: wait until sm_http_fd() is readable or sm_http_timeout_ms()
 * has passed (-1: no limit), call sm_http_run(), take the results.  The body
 * of a result lies in CurrentMemoryContext.
 */
extern int	sm_http_fd(void);
extern long sm_http_timeout_ms(void);
extern void sm_http_run(void);
extern bool sm_http_has_result(void);
extern bool sm_http_next_result(SmHttpResult *result);

#endif							/* SM_HTTP_H */
