/*
 * server.c
 *		HTTP in front of central_receive().
 *
 * libmicrohttpd runs a thread for each client connection: a statement that takes
 * long, or a client that sends slowly, holds up nobody else.  The number of
 * connections is limited, in all and per address; a request that has not arrived
 * after --timeout seconds is dropped, however steadily it trickles.
 *
 * Routes are matched by the last segment of the path, so that the gateway may sit
 * below any prefix of a reverse proxy.
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

/* One line for each thing the gateway does: an SQL function behind a name. */
typedef struct Route
{
	const char *name;
	const char *method;
	bool		has_body;		/* and needs a token */
	Statement	statement;
} Route;

static const Route routes[] = {
	{"events", "POST", true, STATEMENT_RECEIVE},
	{"health", "GET", false, STATEMENT_HEALTH},
};

typedef struct Request
{
	struct timespec begun;
	const Route *route;
	Body	   *body;
	unsigned char token_hash[SM_TOKEN_HASH_LEN];
	bool		answered;
	int			status;
} Request;

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

static enum MHD_Result
send_answer(struct MHD_Connection *connection, Request *request, Answer answer)
{
	struct MHD_Response *response;
	enum MHD_Result result = MHD_NO;
	char		seconds[16];

	if (answer.body == NULL)
		return MHD_NO;
	response = MHD_create_response_from_buffer(strlen(answer.body), answer.body, MHD_RESPMEM_MUST_FREE);
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
		MHD_add_response_header(response, MHD_HTTP_HEADER_ALLOW, request->route->method);
	if (answer.retry_after > 0)
	{
		snprintf(seconds, sizeof(seconds), "%d", answer.retry_after);
		MHD_add_response_header(response, MHD_HTTP_HEADER_RETRY_AFTER, seconds);
	}
	if (draining)
		MHD_add_response_header(response, MHD_HTTP_HEADER_CONNECTION, "close");
	request->answered = true;
	request->status = answer.status;
	result = MHD_queue_response(connection, (unsigned int) answer.status, response);
	MHD_destroy_response(response);
	return result;
}

static enum MHD_Result
send_problem(struct MHD_Connection *connection, Request *request, int status, const char *detail)
{
	return send_answer(connection, request, answer_problem(status, detail));
}

static const Route *
find_route(const char *path)
{
	const char *name = strrchr(path, '/');

	name = name ? name + 1 : path;
	for (size_t i = 0; i < sizeof(routes) / sizeof(routes[0]); i++)
		if (strcmp(routes[i].name, name) == 0)
			return &routes[i];
	return NULL;
}

/* SHA-256 of the bearer token; false when there is none. */
static bool
hash_token(struct MHD_Connection *connection, unsigned char hash[SM_TOKEN_HASH_LEN])
{
	const char *header = MHD_lookup_connection_value(connection, MHD_HEADER_KIND, MHD_HTTP_HEADER_AUTHORIZATION);
	unsigned int len = 0;

	if (header == NULL || strncasecmp(header, "Bearer ", 7) != 0)
		return false;
	header += 7;
	header += strspn(header, " ");
	if (*header == '\0' || strpbrk(header, " \t,") != NULL)
		return false;
	return EVP_Digest(header, strlen(header), hash, &len, EVP_sha256(), NULL) == 1 && len == SM_TOKEN_HASH_LEN;
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

/*
 * Checks all that the headers tell, the token included, so that nobody without one
 * can make the gateway take a body.  Sends the answer itself when something is wrong.
 */
static enum MHD_Result
check_headers(struct MHD_Connection *connection, Request *request, const char *path, const char *method)
{
	const char *encoding = MHD_lookup_connection_value(connection, MHD_HEADER_KIND, MHD_HTTP_HEADER_CONTENT_ENCODING);
	const char *length = MHD_lookup_connection_value(connection, MHD_HEADER_KIND, MHD_HTTP_HEADER_CONTENT_LENGTH);
	Answer		admission;

	request->route = find_route(path);
	if (request->route == NULL)
		return send_problem(connection, request, 404, "This gateway serves /events and /health.");
	if (strcmp(method, request->route->method) != 0)
		return send_problem(connection, request, 405, NULL);
	if (!request->route->has_body)
		return MHD_YES;
	if (!hash_token(connection, request->token_hash))
		return send_problem(connection, request, 401, "Send a token as Authorization: Bearer.");
	if (!is_json(MHD_lookup_connection_value(connection, MHD_HEADER_KIND, MHD_HTTP_HEADER_CONTENT_TYPE)))
		return send_problem(connection, request, 415, "Send application/cloudevents-batch+json.");
	if (encoding != NULL && strcasecmp(encoding, "gzip") != 0 && strcasecmp(encoding, "identity") != 0)
		return send_problem(connection, request, 415, "Content-Encoding may be gzip or identity.");
	if (length != NULL && strtoull(length, NULL, 10) > options->max_body)
		return send_problem(connection, request, 413, "The body is too large.");
	admission = pool_ask(STATEMENT_ADMIT, request->token_hash, NULL, 0);
	if (admission.problem)
		return send_answer(connection, request, admission);
	free(admission.body);
	request->body = body_create(encoding != NULL && strcasecmp(encoding, "gzip") == 0);
	if (request->body == NULL)
		return send_problem(connection, request, 503, "Out of memory.");
	return MHD_YES;
}

/* The whole request is there. */
static enum MHD_Result
finish_request(struct MHD_Connection *connection, Request *request)
{
	const char *data = NULL;
	size_t		len = 0;

	if (request->body != NULL)
	{
		int			status = body_end(request->body);

		if (status != 0)
			return send_problem(connection, request, status, body_problem(status));
		data = body_data(request->body, &len);
	}
	return send_answer(connection, request, pool_ask(request->route->statement, request->token_hash, data, len));
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
		*state = request;
		count_running(1);
		return check_headers(connection, request, path, method);
	}
	if (*size == 0)
		return request->answered ? MHD_YES : finish_request(connection, request);
	if (!request->answered && elapsed_ms(request) > options->timeout * 1000L)
	{
		request->status = 408;
		return MHD_NO;
	}
	if (request->body != NULL && (request->status = body_take(request->body, data, *size)) != 0)
		return MHD_NO;
	*size = 0;
	return MHD_YES;
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
	char		client[64];

	(void) cls;
	if (request == NULL)
		return;
	format_client(connection, client, sizeof(client));
	log_line("%s %s %d %zu bytes %ld ms%s", client, request->route ? request->route->name : "-", request->status,
			 body_received(request->body), elapsed_ms(request),
			 code == MHD_REQUEST_TERMINATED_COMPLETED_OK ? "" : " (broken off)");
	body_free(request->body);
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
		{MHD_OPTION_HTTPS_MEM_CERT, 0, NULL}, {MHD_OPTION_HTTPS_MEM_KEY, 0, NULL}, {MHD_OPTION_END, 0, NULL}
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

	if ((listening = listen_open(opts->host, opts->port, port)) < 0)
		return false;
	http = MHD_start_daemon(flags, 0, NULL, NULL, handle_request, NULL,
							MHD_OPTION_LISTEN_SOCKET, listening,
							MHD_OPTION_CONNECTION_LIMIT, (unsigned int) opts->clients,
							MHD_OPTION_PER_IP_CONNECTION_LIMIT, (unsigned int) opts->clients_per_address,
							MHD_OPTION_CONNECTION_TIMEOUT, (unsigned int) opts->timeout,
							MHD_OPTION_CONNECTION_MEMORY_LIMIT, (size_t) 65536,
							MHD_OPTION_STRICT_FOR_CLIENT, 1,
							MHD_OPTION_NOTIFY_COMPLETED, end_request, NULL,
							MHD_OPTION_ARRAY, tls,
							MHD_OPTION_END);
	if (http == NULL)
	{
		log_line("cannot serve HTTP: %s", opts->tls_cert ? "is the certificate that of the key?" : strerror(errno));
		return false;
	}
	return true;
}

/* Takes no more connections, lets running requests finish, ends. */
void
server_stop(int timeout)
{
	struct timespec until;
	MHD_socket	listening;

	draining = true;
	listening = MHD_quiesce_daemon(http);

	clock_gettime(CLOCK_REALTIME, &until);
	until.tv_sec += timeout;
	pthread_mutex_lock(&running_lock);
	while (running > 0 && pthread_cond_timedwait(&running_changed, &running_lock, &until) == 0)
		;
	pthread_mutex_unlock(&running_lock);
	MHD_stop_daemon(http);
	if (listening != MHD_INVALID_SOCKET)
		close(listening);
	free(tls_cert);
	free(tls_key);
}
