/*
 * server.c
 *		HTTP in front of the central functions.
 *
 * libmicrohttpd runs a thread for each client connection: a statement that takes
 * long, or a client that sends slowly, holds up nobody else.  The number of
 * connections is limited, in all and per address, and their patience by clients.c.
 *
 * Routes are matched by the last segments of the path, so that the gateway may sit
 * below any prefix of a reverse proxy that does not itself end like a named route.
 *
 * A refusal that the headers call for is sent when the body has been read and
 * thrown away: a client that is still sending when its connection is closed may
 * lose the answer, and would take its wrong token for a broken link.  One that asks
 * first (Expect: 100-continue) is answered at once.
 */
#include "gateway.h"

#include <errno.h>
#include <netdb.h>
#include <netinet/in.h>
#include <pthread.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <strings.h>
#include <sys/socket.h>
#include <time.h>
#include <unistd.h>

#include <microhttpd.h>
#include <openssl/evp.h>

typedef enum RouteKind
{
	ROUTE_OPEN,					/* GET, for everybody */
	ROUTE_BODY,					/* POST, with a token */
	ROUTE_NAMED,				/* GET, with a token and ?branch=; a name may follow in the path */
} RouteKind;

/* One line for each thing the gateway does: an SQL function behind a name. */
typedef struct Route
{
	const char *name;
	RouteKind	kind;
	Statement	statement;
} Route;

static const Route routes[] = {
	{"events", ROUTE_BODY, STATEMENT_RECEIVE},
	{"verify", ROUTE_BODY, STATEMENT_VERIFY},
	{"reconcile", ROUTE_BODY, STATEMENT_RECONCILE},
	{"reference", ROUTE_NAMED, STATEMENT_REFERENCE},
	{"health", ROUTE_OPEN, STATEMENT_HEALTH},
};

typedef struct Request
{
	struct timespec begun;
	const Route *route;
	Body	   *body;
	Signature  *signature;		/* NULL: none is asked for */
	unsigned char token_hash[SM_TOKEN_HASH_LEN];
	Parameter	name;			/* these two of a ROUTE_NAMED, kept by libmicrohttpd */
	Parameter	branch;
	Answer		refusal;		/* status not 0: to be sent when the body is over */
	bool		answered;
	bool		last;			/* on its connection */
	int			status;
	char		method[16];		/* these two for the log */
	char		path[96];
} Request;

/* The value of a header or of a parameter in the URL, and how often it is there. */
typedef struct Header
{
	const char *name;
	const char *value;
	size_t		len;
	int			count;
} Header;

static const Options *options = NULL;
static struct MHD_Daemon *http = NULL;
static char *tls_cert = NULL;
static char *tls_key = NULL;
static pthread_mutex_t running_lock = PTHREAD_MUTEX_INITIALIZER;
static pthread_cond_t running_changed = PTHREAD_COND_INITIALIZER;
static int	running = 0;		/* requests being served, under running_lock */
static atomic_bool draining = false;

static void
count_running(int change)
{
	pthread_mutex_lock(&running_lock);
	running += change;
	pthread_cond_broadcast(&running_changed);
	pthread_mutex_unlock(&running_lock);
}

static long
elapsed_ms(const Request *request)
{
	struct timespec now;

	clock_gettime(CLOCK_MONOTONIC, &now);
	return (now.tv_sec - request->begun.tv_sec) * 1000 + (now.tv_nsec - request->begun.tv_nsec) / 1000000;
}

static Client *
client_of(struct MHD_Connection *connection)
{
	const union MHD_ConnectionInfo *info = MHD_get_connection_info(connection, MHD_CONNECTION_INFO_SOCKET_CONTEXT);

	return info ? info->socket_context : NULL;
}

static enum MHD_Result
find_value(void *arg, enum MHD_ValueKind kind, const char *name, size_t name_len, const char *value, size_t len)
{
	Header	   *header = arg;

	(void) name_len;
	if ((kind == MHD_HEADER_KIND ? strcasecmp : strcmp) (name, header->name) == 0 && header->count++ == 0)
	{
		header->value = value;
		header->len = len;
	}
	return MHD_YES;
}

static Header
get_header(struct MHD_Connection *connection, const char *name)
{
	Header		header = {.name = name};

	MHD_get_connection_values_n(connection, MHD_HEADER_KIND, find_value, &header);
	return header;
}

static Header
get_argument(struct MHD_Connection *connection, const char *name)
{
	Header		argument = {.name = name};

	MHD_get_connection_values_n(connection, MHD_GET_ARGUMENT_KIND, find_value, &argument);
	return argument;
}

static enum MHD_Result
send_answer(struct MHD_Connection *connection, Request *request, Answer answer)
{
	struct MHD_Response *response;
	enum MHD_Result result = MHD_NO;
	char		seconds[16];
	size_t		size;

	if (answer.body == NULL)
		return MHD_NO;
	size = strlen(answer.body);
	response = MHD_create_response_from_buffer(size, answer.body, MHD_RESPMEM_MUST_FREE);
	if (response == NULL)
	{
		free(answer.body);
		return MHD_NO;
	}
	MHD_add_response_header(response, MHD_HTTP_HEADER_CONTENT_TYPE,
							answer.problem ? "application/problem+json" : "application/json");
	MHD_add_response_header(response, MHD_HTTP_HEADER_CACHE_CONTROL, "no-store");
	if (answer.status == MHD_HTTP_UNAUTHORIZED)
		MHD_add_response_header(response, MHD_HTTP_HEADER_WWW_AUTHENTICATE, "Bearer");
	if (answer.status == MHD_HTTP_METHOD_NOT_ALLOWED && request->route != NULL)
		MHD_add_response_header(response, MHD_HTTP_HEADER_ALLOW, request->route->kind == ROUTE_BODY ? "POST" : "GET, HEAD");
	if (answer.retry_after > 0)
	{
		snprintf(seconds, sizeof(seconds), "%d", answer.retry_after);
		MHD_add_response_header(response, MHD_HTTP_HEADER_RETRY_AFTER, seconds);
	}
	if (draining || request->last)
		MHD_add_response_header(response, MHD_HTTP_HEADER_CONNECTION, "close");
	request->answered = true;
	request->status = answer.status;
	client_begin_reading(client_of(connection), size);
	result = MHD_queue_response(connection, (unsigned int) answer.status, response);
	MHD_destroy_response(response);
	return result;
}

static const char *
start_of_segment(const char *path, const char *end)
{
	while (end > path && end[-1] != '/')
		end--;
	return end;
}

static const Route *
match_segment(const char *segment, const char *end)
{
	size_t		len = (size_t) (end - segment);

	for (size_t i = 0; i < sizeof(routes) / sizeof(routes[0]); i++)
		if (strlen(routes[i].name) == len && memcmp(routes[i].name, segment, len) == 0)
			return &routes[i];
	return NULL;
}

/* The route that a path ends with, and the name that may stand behind it. */
static const Route *
find_route(const char *path, Parameter *name)
{
	const char *end = path + strlen(path);
	const char *last = start_of_segment(path, end);

	if (last > path)
	{
		const Route *route = match_segment(start_of_segment(path, last - 1), last - 1);

		/* first: a thing may have the name of a route */
		if (route != NULL && route->kind == ROUTE_NAMED)
		{
			*name = (Parameter) {last, (size_t) (end - last)};
			return route;
		}
	}
	return match_segment(last, end);
}

/* SHA-256 of the bearer token; false when there is none, or more than one. */
static bool
hash_token(struct MHD_Connection *connection, unsigned char hash[SM_TOKEN_HASH_LEN])
{
	static const char token_characters[] =
	"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-._~+/";	/* RFC 6750 */
	Header		header = get_header(connection, MHD_HTTP_HEADER_AUTHORIZATION);
	const char *token;
	size_t		len;
	unsigned int hash_len = 0;

	if (header.count != 1 || strncasecmp(header.value, "Bearer ", 7) != 0)
		return false;
	token = header.value + 7;
	token += strspn(token, " ");
	len = strspn(token, token_characters);
	if (len == 0)
		return false;
	len += strspn(token + len, "=");
	if (token[len] != '\0')
		return false;
	return EVP_Digest(token, len, hash, &hash_len, EVP_sha256(), NULL) == 1 && hash_len == SM_TOKEN_HASH_LEN;
}

static bool
is_json(const char *content_type)
{
	static const char *const types[] = {"application/cloudevents-batch+json", "application/json"};

	if (content_type == NULL)
		return false;
	for (size_t i = 0; i < sizeof(types) / sizeof(types[0]); i++)
	{
		size_t		len = strlen(types[i]);

		if (strncasecmp(content_type, types[i], len) == 0 && strchr("; \t", content_type[len]) != NULL)
			return true;
	}
	return false;
}

static bool
is_method_of(const Route *route, const char *method)
{
	if (route->kind == ROUTE_BODY)
		return strcmp(method, MHD_HTTP_METHOD_POST) == 0;
	return strcmp(method, MHD_HTTP_METHOD_GET) == 0 || strcmp(method, MHD_HTTP_METHOD_HEAD) == 0;
}

/*
 * Where bodies are to be signed: begins to look at the signature.  The answer has status 0
 * when nothing is wrong yet.
 */
static Answer
begin_signature(struct MHD_Connection *connection, Request *request)
{
	Header		id = get_header(connection, "webhook-id");
	Header		timestamp = get_header(connection, "webhook-timestamp");
	Header		given = get_header(connection, "webhook-signature");

	if (options->signing_keys == NULL)
		return (Answer) {0};
	if (id.count != 1 || timestamp.count != 1 || given.count != 1)
		return answer_problem(401, "Bodies are to be signed: send webhook-id, webhook-timestamp and webhook-signature.");
	request->signature = signature_begin(id.value, timestamp.value, given.value);
	if (request->signature == NULL)
		return answer_problem(503, "Signatures cannot be verified at the moment.");
	return (Answer) {0};
}

/*
 * Checks all that the headers tell, the token included, so that nobody without one
 * can make the gateway keep a body.  The answer has status 0 when nothing is wrong.
 */
static Answer
check_headers(struct MHD_Connection *connection, Request *request, const char *path, const char *method)
{
	Header		type = get_header(connection, MHD_HTTP_HEADER_CONTENT_TYPE);
	Header		encoding = get_header(connection, MHD_HTTP_HEADER_CONTENT_ENCODING);
	Header		length = get_header(connection, MHD_HTTP_HEADER_CONTENT_LENGTH);
	Header		transfer = get_header(connection, MHD_HTTP_HEADER_TRANSFER_ENCODING);
	bool		gzip = encoding.count == 1 && strcasecmp(encoding.value, "gzip") == 0;
	Header		branch = get_argument(connection, "branch");
	const Route *route = find_route(path, &request->name);
	Answer		admission;

	request->route = route;
	if (route == NULL)
		return answer_problem(404, "This gateway serves /events, /verify, /reconcile, /reference and /health.");
	if (!is_method_of(route, method))
		return answer_problem(405, NULL);
	if (draining)
		return answer_problem(503, "This gateway is ending.");
	if (route->kind == ROUTE_OPEN)
		return (Answer) {0};
	if (route->kind == ROUTE_BODY && length.count == 0 && transfer.count == 0)
		return answer_problem(411, NULL);
	if (!hash_token(connection, request->token_hash))
		return answer_problem(401, "Send one token as Authorization: Bearer.");
	if (route->kind == ROUTE_NAMED)
	{
		if (branch.count > 1)
			return answer_problem(400, "The parameter branch is there twice.");
		request->branch = (Parameter) {branch.value, branch.len};
		return (Answer) {0};
	}
	if (type.count != 1 || !is_json(type.value))
		return answer_problem(415, "Send application/json, events also as application/cloudevents-batch+json.");
	if (encoding.count > 1 || (encoding.count == 1 && !gzip && strcasecmp(encoding.value, "identity") != 0))
		return answer_problem(415, "Content-Encoding may be gzip or identity.");
	if (length.count > 0 && strtoull(length.value, NULL, 10) > options->max_body)
		return answer_problem(413, "The body is too large.");
	admission = pool_ask(STATEMENT_ADMIT, &(Parameter) {(const char *) request->token_hash, SM_TOKEN_HASH_LEN});
	if (admission.problem)
		return admission;
	answer_free(&admission);
	admission = begin_signature(connection, request);
	if (admission.problem)
		return admission;
	request->body = body_create(gzip);
	if (request->body == NULL)
		return answer_problem(503, "Out of memory.");
	return (Answer) {0};
}

/*
 * Where a request ends must be beyond doubt: a proxy in front of us that sees it
 * end elsewhere could be made to pass on a request of somebody else.
 */
static bool
is_well_framed(struct MHD_Connection *connection)
{
	Header		length = get_header(connection, MHD_HTTP_HEADER_CONTENT_LENGTH);
	Header		transfer = get_header(connection, MHD_HTTP_HEADER_TRANSFER_ENCODING);

	if (transfer.count > 0)
		return transfer.count == 1 && length.count == 0 && strcasecmp(transfer.value, "chunked") == 0;
	return length.count <= 1;
}

/* The headers are there. */
static enum MHD_Result
begin_request(struct MHD_Connection *connection, Request *request, const char *path, const char *method)
{
	client_begin(client_of(connection), CLIENT_WAITS);
	request->last = !is_well_framed(connection);
	if (request->last)
		return send_answer(connection, request, answer_problem(400, "The length of the body is not clear."));
	request->refusal = check_headers(connection, request, path, method);
	if (request->refusal.status != 0)
	{
		Answer		refusal = request->refusal;

		if (request->body == NULL && get_header(connection, MHD_HTTP_HEADER_EXPECT).count == 0)
			request->body = body_create(false);
		if (request->body == NULL)
		{
			request->refusal = (Answer) {0};
			return send_answer(connection, request, refusal);
		}
		body_refuse(request->body, refusal.status);
	}
	client_begin(client_of(connection), CLIENT_SENDS);
	return MHD_YES;
}

/* The whole request is there. */
static enum MHD_Result
finish_request(struct MHD_Connection *connection, Request *request)
{
	Parameter	parameters[SM_MAX_PARAMETERS] = {{(const char *) request->token_hash, SM_TOKEN_HASH_LEN}};

	client_begin(client_of(connection), CLIENT_WAITS);
	if (request->refusal.status != 0)
	{
		Answer		refusal = request->refusal;

		request->refusal = (Answer) {0};
		return send_answer(connection, request, refusal);
	}
	if (request->route->statement == STATEMENT_HEALTH)
		return send_answer(connection, request, health_ask());
	if (request->route->kind == ROUTE_BODY)
	{
		int			status = body_end(request->body);

		if (status != 0)
			return send_answer(connection, request, answer_problem(status, body_problem(status)));
		if (request->signature != NULL && !signature_fits(request->signature))
			return send_answer(connection, request, answer_problem(401, "The signature does not fit the body."));
		parameters[1] = body_data(request->body);
	}
	else
	{
		parameters[1] = request->name;
		parameters[2] = request->branch;
	}
	return send_answer(connection, request, pool_ask(request->route->statement, parameters));
}

/* For the log: without spaces, which separate its columns. */
static void
copy_word(char *to, size_t size, const char *from)
{
	snprintf(to, size, "%s", from);
	for (; *to != '\0'; to++)
		if ((unsigned char) *to <= ' ' || (unsigned char) *to >= 127)
			*to = '?';
}

static enum MHD_Result
handle_request(void *cls, struct MHD_Connection *connection, const char *path, const char *method,
			   const char *version, const char *data, size_t *size, void **state)
{
	Request    *request = *state;

	(void) cls;
	(void) version;
	if (request == NULL)
	{
		request = calloc(1, sizeof(Request));
		if (request == NULL)
			return MHD_NO;
		clock_gettime(CLOCK_MONOTONIC, &request->begun);
		copy_word(request->method, sizeof(request->method), method);
		copy_word(request->path, sizeof(request->path), path);
		*state = request;
		count_running(1);
		return begin_request(connection, request, path, method);
	}
	if (*size == 0)
		return request->answered ? MHD_YES : finish_request(connection, request);
	signature_take(request->signature, data, *size);
	if (request->body != NULL && (request->status = body_take(request->body, data, *size)) != 0)
		return MHD_NO;
	*size = 0;
	return MHD_YES;
}

/* A connection has come or gone. */
static void
note_connection(void *cls, struct MHD_Connection *connection, void **client, enum MHD_ConnectionNotificationCode code)
{
	(void) cls;
	if (code == MHD_CONNECTION_NOTIFY_STARTED)
	{
		const union MHD_ConnectionInfo *info = MHD_get_connection_info(connection, MHD_CONNECTION_INFO_CONNECTION_FD);

		*client = info ? client_create(info->connect_fd) : NULL;
	}
	else
	{
		client_free(*client);
		*client = NULL;
	}
}

static void
format_client(struct MHD_Connection *connection, char *text, size_t size)
{
	const union MHD_ConnectionInfo *info = MHD_get_connection_info(connection, MHD_CONNECTION_INFO_CLIENT_ADDRESS);

	if (info == NULL || getnameinfo(info->client_addr,
									info->client_addr->sa_family == AF_INET6 ? sizeof(struct sockaddr_in6) : sizeof(struct sockaddr_in),
									text, (socklen_t) size, NULL, 0, NI_NUMERICHOST) != 0)
		snprintf(text, size, "?");
}

static void
end_request(void *cls, struct MHD_Connection *connection, void **state, enum MHD_RequestTerminationCode code)
{
	Request    *request = *state;
	Client	   *client = client_of(connection);
	char		address[64];

	(void) cls;
	if (request == NULL)
		return;
	format_client(connection, address, sizeof(address));
	if (!request->answered && client_is_late(client))
		request->status = MHD_HTTP_REQUEST_TIMEOUT;
	log_line("%s %s %s %d %zu bytes %ld ms%s", address, request->method, request->path, request->status,
			 body_received(request->body), elapsed_ms(request),
			 code == MHD_REQUEST_TERMINATED_COMPLETED_OK ? "" : " (broken off)");
	client_begin(client, CLIENT_IDLE);
	answer_free(&request->refusal);
	body_free(request->body);
	signature_free(request->signature);
	free(request);
	*state = NULL;
	count_running(-1);
}

static char *
read_file(const char *path)
{
	FILE	   *file = fopen(path, "r");
	char	   *text = calloc(1, 65536);

	if (file == NULL || text == NULL || fread(text, 1, 65535, file) == 0)
	{
		if (file != NULL)
			fclose(file);
		free(text);
		return NULL;
	}
	fclose(file);
	return text;
}

bool
server_start(const Options *opts, int *port)
{
	unsigned int flags = MHD_USE_THREAD_PER_CONNECTION | MHD_USE_INTERNAL_POLLING_THREAD | MHD_USE_POLL | MHD_USE_ITC;
	struct MHD_OptionItem tls[] = {
		{MHD_OPTION_HTTPS_MEM_CERT, 0, NULL}, {MHD_OPTION_HTTPS_MEM_KEY, 0, NULL},
		{MHD_OPTION_HTTPS_PRIORITIES, 0, "NORMAL:-VERS-ALL:+VERS-TLS1.3:+VERS-TLS1.2"}, {MHD_OPTION_END, 0, NULL}
	};
	int			listening;

	options = opts;
	body_init(opts);
	if (opts->tls_cert != NULL)
	{
		flags |= MHD_USE_TLS;
		tls[0].ptr_value = tls_cert = read_file(opts->tls_cert);
		tls[1].ptr_value = tls_key = read_file(opts->tls_key);
		if (tls_cert == NULL || tls_key == NULL)
		{
			log_line("cannot read the certificate or its key");
			return false;
		}
	}
	else
		tls[0].option = MHD_OPTION_END;

	if (!clients_start(opts) || (listening = listen_open(opts->host, opts->port, port)) < 0)
		return false;
	http = MHD_start_daemon(flags, 0, NULL, NULL, handle_request, NULL,
							MHD_OPTION_LISTEN_SOCKET, listening,
							MHD_OPTION_CONNECTION_LIMIT, (unsigned int) opts->clients,
							MHD_OPTION_PER_IP_CONNECTION_LIMIT, (unsigned int) opts->clients_per_address,
							MHD_OPTION_CONNECTION_MEMORY_LIMIT, (size_t) 65536,
							MHD_OPTION_STRICT_FOR_CLIENT, 1,
							MHD_OPTION_NOTIFY_COMPLETED, end_request, NULL,
							MHD_OPTION_NOTIFY_CONNECTION, note_connection, NULL,
							MHD_OPTION_ARRAY, tls,
							MHD_OPTION_END);
	if (http == NULL)
	{
		log_line("cannot serve HTTP: %s", opts->tls_cert ? "is the certificate that of the key?" : strerror(errno));
		return false;
	}
	return true;
}

/*
 * Takes no more connections, lets running requests finish, ends.  False: some have
 * not finished in time, and their threads still run.
 */
bool
server_stop(int timeout)
{
	struct timespec until;
	MHD_socket	listening;
	bool		finished;

	draining = true;
	listening = MHD_quiesce_daemon(http);
	if (listening != MHD_INVALID_SOCKET)
		shutdown(listening, SHUT_RDWR);

	clock_gettime(CLOCK_REALTIME, &until);
	until.tv_sec += timeout;
	pthread_mutex_lock(&running_lock);
	while (running > 0 && pthread_cond_timedwait(&running_changed, &running_lock, &until) == 0)
		;
	finished = running == 0;
	pthread_mutex_unlock(&running_lock);
	if (!finished)
		return false;
	MHD_stop_daemon(http);
	if (listening != MHD_INVALID_SOCKET)
		close(listening);
	clients_stop();
	free(tls_cert);
	free(tls_key);
	return true;
}
