/*
 * gateway.h
 *		What the parts of the gateway share.
 */
#ifndef SM_GATEWAY_H
#define SM_GATEWAY_H

#include <stdbool.h>
#include <stddef.h>

#define SM_TOKEN_HASH_LEN	32	/* SHA-256 */

typedef struct Options
{
	const char *host;
	const char *port;
	const char *database;		/* libpq conninfo */
	int			connections;	/* to the database */
	int			clients;		/* HTTP connections at once */
	int			clients_per_address;
	size_t		max_body;		/* bytes, as sent */
	size_t		max_unpacked;	/* bytes, after decompression */
	size_t		max_memory;		/* bytes, all bodies together */
	int			timeout;		/* seconds: one request, one statement */
	const char *tls_cert;
	const char *tls_key;
	const char *signing_keys;	/* file; NULL: bodies need no signature */
} Options;

/* An answer to be sent: what the database returned, or a problem (RFC 9457). */
typedef struct Answer
{
	int			status;
	char	   *body;			/* malloc'd */
	bool		problem;
	int			retry_after;	/* seconds; 0: no such header */
} Answer;

/* What the gateway asks the database; see database.c */
typedef enum Statement
{
	STATEMENT_HEALTH,
	STATEMENT_ADMIT,
	STATEMENT_RECEIVE,
	STATEMENT_VERIFY,
	STATEMENT_RECONCILE,
	STATEMENT_REFERENCE,
} Statement;

/* A parameter of a statement: bytes, or SQL's NULL without any. */
typedef struct Parameter
{
	const char *data;
	size_t		len;
} Parameter;

#define SM_MAX_PARAMETERS	3

/* problem.c */
extern Answer answer_ok(char *body);
extern Answer answer_problem(int status, const char *detail);
extern Answer answer_copy(const Answer *answer);
extern void answer_free(Answer *answer);
extern void log_line(const char *fmt,...) __attribute__((format(printf, 1, 2)));

/* pool.c */
extern bool pool_start(const Options *options);
extern void pool_stop(void);
extern Answer pool_ask(Statement statement, const Parameter *parameters);

/* health.c */
extern bool health_start(const Options *options);
extern bool health_stop(void);
extern Answer health_ask(void);

/* body.c */
typedef struct Body Body;

extern void body_init(const Options *options);
extern Body *body_create(bool gzip);
extern void body_refuse(Body *body, int status);
extern int	body_take(Body *body, const char *data, size_t size);
extern int	body_end(Body *body);
extern const char *body_problem(int status);
extern Parameter body_data(const Body *body);
extern size_t body_received(const Body *body);
extern void body_free(Body *body);

/* signature.c */
typedef struct Signature Signature;

extern bool signature_init(const Options *options);
extern Signature *signature_begin(const char *id, const char *timestamp, const char *given);
extern void signature_take(Signature *signature, const char *data, size_t size);
extern bool signature_fits(Signature *signature);
extern void signature_free(Signature *signature);

/* clients.c: all but CLIENT_WAITS are limited to --timeout seconds, CLIENT_READS by the answer's size too */
typedef enum ClientPhase
{
	CLIENT_NEW,					/* no request yet */
	CLIENT_SENDS,				/* headers are there, the body is on its way */
	CLIENT_WAITS,				/* we are busy with its request */
	CLIENT_READS,				/* the answer is on its way */
	CLIENT_IDLE,				/* between two requests */
} ClientPhase;
typedef struct Client Client;

extern bool clients_start(const Options *options);
extern void clients_stop(void);
extern Client *client_create(int fd);
extern void client_free(Client *client);
extern void client_begin(Client *client, ClientPhase phase);
extern void client_begin_reading(Client *client, size_t size);
extern bool client_is_late(Client *client);

/* listen.c */
extern int	listen_open(const char *host, const char *port, int *bound);

/* server.c */
extern bool server_start(const Options *options, int *port);
extern bool server_stop(int timeout);

#endif							/* SM_GATEWAY_H */
